"""The plan: what is asked for, within a budget, from the first copy that has it; only metadata is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from oxe_mix.cards import load_cards
from oxe_mix.lock import read_lock
from oxe_mix.mix import DatasetSpec, Mix
from oxe_mix.plan import plan_download
from oxe_mix.source_file import Patience
from tests.conftest import OXE_MIX, run
from tests.test_download import _content, _download, _payloads

TWO = """\
name: two
datasets:
- {{name: viola, version: 0.1.0, fraction: {viola}{more}}}
- {{name: bridge_orig, version: 1.0.0, fraction: 0.9}}
"""


def _mix(tmp_path: Path, viola: float = 0.9, more: str = "", head: str = "") -> Path:
    file = tmp_path / "two.yaml"
    file.write_text(head + TWO.format(viola=viola, more=more))
    return file


def _plan(mix: Path, bucket: Path, *more: str) -> dict[str, int]:
    said = run(OXE_MIX, "download", "--mix", mix, "--source", bucket, "--dry-run", "--json", *more).stdout
    plan = json.loads(said.splitlines()[0])
    assert plan["event"] == "plan"
    total: dict[str, int] = plan["total"]
    assert total["bytes"] == sum(split["bytes"] for split in plan["splits"])
    return total | {split["dataset"]: split["episodes"] for split in plan["splits"]}


def test_a_dry_run_says_episodes_shards_bytes_and_steps_per_dataset_and_in_total(
    bucket: Path, tmp_path: Path
) -> None:
    mix = _mix(tmp_path)
    said = run(
        OXE_MIX, "download", "--mix", mix, "--source", bucket, "--dry-run", "--out", tmp_path / "d"
    ).stdout
    header, _, viola, bridge, total, free = said.splitlines()
    assert header.split() == ["dataset", "split", "episodes", "shards", "about", "steps", "(est.)"]
    assert viola.split()[:8] == ["viola", "train", "28", "of", "31", "5", "of", "5"]
    assert bridge.split()[:8] == ["bridge_orig", "train", "43", "of", "48", "5", "of", "5"]
    assert total.split()[:3] == ["total", "71", "10"]
    assert "still to fetch about" in free
    assert "disk free" in free


def test_planned_bytes_are_those_that_are_fetched(bucket: Path, tmp_path: Path) -> None:
    """Whole shards weigh what the source lists; only of the last one the share is estimated."""
    mix = _mix(tmp_path, viola=1.0)
    planned = _plan(mix, bucket)["bytes"]
    _download(mix, bucket, tmp_path / "data")
    lock = read_lock(tmp_path / "data")
    assert lock is not None
    fetched = sum(shard.num_bytes for d in lock.datasets for s in d.splits for shard in s.shards)
    assert planned == pytest.approx(fetched, rel=0.05)


def test_a_budget_scales_all_fractions_alike_and_is_kept(bucket: Path, tmp_path: Path) -> None:
    mix = _mix(tmp_path)
    full = _plan(mix, bucket)
    half = _plan(mix, bucket, "--max-gb", f"{full['bytes'] / 2 / 1e9}")
    assert 0.4 * full["bytes"] < half["bytes"] <= 0.5 * full["bytes"]
    assert half["viola"] / full["viola"] == pytest.approx(half["bridge_orig"] / full["bridge_orig"], abs=0.05)
    assert _plan(mix, bucket, "--max-gb", "10") == full


def test_a_datasets_own_budget_leaves_the_others_alone(bucket: Path, tmp_path: Path) -> None:
    full = _plan(_mix(tmp_path), bucket)
    capped = _plan(_mix(tmp_path, more=", max_gb: 0.0003"), bucket)
    assert capped["bridge_orig"] == full["bridge_orig"]
    assert 0 < capped["viola"] < full["viola"]
    whole = _plan(_mix(tmp_path, head="max_gb: 0.001\n"), bucket)
    assert whole["bytes"] <= 1e6


def test_a_larger_budget_grows_the_smaller_one(bucket: Path, tmp_path: Path) -> None:
    """A budget is a fraction like any other: nested, and repeated it does nothing."""
    mix, out = _mix(tmp_path), tmp_path / "data"
    _download(mix, bucket, out, "--max-gb", "0.001")
    assert "nothing to do" in _download(mix, bucket, out, "--max-gb", "0.001")
    small = {f.name.rsplit("-of-")[0]: _payloads(f) for f in (out / "viola/0.1.0").glob("*.tfrecord-*")}
    _download(mix, bucket, out, "--max-gb", "0.002")
    large = {f.name.rsplit("-of-")[0]: _payloads(f) for f in (out / "viola/0.1.0").glob("*.tfrecord-*")}
    assert len(large) > len(small) > 0
    assert all(large[name][: len(records)] == records for name, records in small.items())
    _download(mix, bucket, tmp_path / "fresh", "--max-gb", "0.002")
    assert _content(out) == _content(tmp_path / "fresh")
    assert "shrinks" in _download(mix, bucket, out, "--max-gb", "0.001", code=2)


def test_a_budget_below_one_episode_each_is_refused(bucket: Path, tmp_path: Path) -> None:
    said = _download(_mix(tmp_path), bucket, tmp_path / "data", "--max-gb", "0.00001", code=2)
    assert "viola, bridge_orig: one episode of each is" in said
    assert "more than max_gb 1e-05" in said


def test_a_disk_that_would_not_hold_it_is_refused_with_a_budget_that_would(
    bucket: Path, tmp_path: Path
) -> None:
    """The metadata of a source is all that a plan sees: here it promises an exabyte."""
    source = tmp_path / "bucket"
    shutil.copytree(bucket / "viola", source / "viola")
    file = source / "viola/0.1.0/dataset_info.json"
    info = json.loads(file.read_text())
    for shard in (source / "viola/0.1.0").glob("*.tfrecord-*"):
        shard.unlink()
    info["splits"][0]["numBytes"] = str(10**18)
    file.write_text(json.dumps(info))
    mix = tmp_path / "mix.yaml"
    mix.write_text("name: m\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 0.5}\n")
    for more in ((), ("--dry-run",)):
        said = _download(mix, source, tmp_path / "data", *more, code=2)
        assert "the disk would not hold this" in said
        assert "--max-gb" in said
    assert not list(tmp_path.glob("data/viola"))


def test_a_source_without_shards_that_it_lists_is_warned_of_before(bucket: Path, tmp_path: Path) -> None:
    source = tmp_path / "bucket"
    shutil.copytree(bucket / "viola", source / "viola")
    shutil.copytree(bucket / "bridge_dataset", source / "bridge_dataset")
    next(iter(sorted((source / "viola/0.1.0").glob("viola-train*")))).unlink()
    done = run(OXE_MIX, "download", "--mix", _mix(tmp_path, viola=1.0), "--source", source, "--dry-run")
    assert f"warning: {source}/viola/0.1.0: 1 of 5 shards asked for are not there" in done.stderr


def test_every_dataset_that_is_not_there_is_named_at_once(bucket: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    names = ("bc_z", "viola", "toto")
    entries = "".join(f"- {{name: {name}, version: 0.1.0, fraction: 0.1}}\n" for name in names)
    mix.write_text(f"name: m\ndatasets:\n{entries}")
    said = _download(mix, bucket, tmp_path / "data", "--dry-run", code=2)
    assert [line.split()[1] for line in said.splitlines()] == ["bc_z", "toto"]


def test_a_mirror_stands_in_for_a_dataset_and_for_a_shard(bucket: Path, tmp_path: Path) -> None:
    """The first copy lacks one dataset and one shard of the other; the result is that of a whole copy."""
    first = tmp_path / "first"
    shutil.copytree(bucket / "viola", first / "viola")
    lost = sorted((first / "viola/0.1.0").glob("viola-train*"))[1]
    lost.unlink()
    mix = tmp_path / "mirrors.yaml"
    mix.write_text(f"source: [{first}, {bucket}]\n{TWO.format(viola=1.0, more='')}")
    run(OXE_MIX, "download", "--mix", mix, "--out", tmp_path / "data", "--workers", "1")
    _download(_mix(tmp_path, viola=1.0), bucket, tmp_path / "whole")
    one, two = _content(tmp_path / "data"), _content(tmp_path / "whole")
    assert one.pop("oxe-mix.lock.json") != two.pop("oxe-mix.lock.json")  # it names the sources
    assert one == two
    lock = read_lock(tmp_path / "data")
    assert lock is not None
    assert [d.source for d in lock.datasets] == [f"{first}/viola/0.1.0", f"{bucket}/bridge_dataset/1.0.0"]


def test_a_mirror_of_another_cut_is_not_mixed_in(bucket: Path, tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    for copy in (first, other):
        shutil.copytree(bucket / "viola", copy / "viola")
    lost = sorted((first / "viola/0.1.0").glob("viola-train*"))[1]
    lost.unlink()
    shard = other / "viola/0.1.0" / lost.name
    from oxe_mix.tfrecord import frame

    shard.write_bytes(b"".join(map(frame, _payloads(shard)[:-1])))
    mix = tmp_path / "mix.yaml"
    mix.write_text("name: m\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 1}\n")
    done = run(
        *(OXE_MIX, "download", "--mix", mix, "--source", first, "--source", other),
        *("--out", tmp_path / "data", "--workers", "1"),
        code=1,
    )
    assert f"{lost}: not there" in done.stderr
    assert "records, dataset_info.json says" in done.stderr


def test_a_dataset_without_a_public_copy_asks_for_one(tmp_path: Path, bucket: Path) -> None:
    hidden = next(name for name in ("droid_wipe", "tdroid_carrot_in_bowl") if load_cards().find(name))
    card = load_cards().get(hidden)
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        f"name: m\ndatasets:\n- {{name: {hidden}, version: {card.version}, fraction: 1}}\n"
        if card.version
        else ""
    )
    said = _download(mix, bucket, tmp_path / "data", code=2)
    assert f"{hidden}: no public copy is known; name yours with source: or --source" in said


def test_the_steps_of_a_dataset_that_were_counted_are_not_guessed(bucket: Path) -> None:
    spec = DatasetSpec(name="fractal20220817_data", version="0.1.0", fraction=1.0)
    (plan,) = plan_download(Mix(name="m", source=str(bucket), datasets=(spec,)), load_cards(), Patience())
    card = load_cards().get(spec.name)
    assert card.steps == 3_786_400
    assert plan.estimated_frames == round(plan.episodes * 3_786_400 / 87_212)


@pytest.mark.parametrize("budget", ["0", "-3", "nan"])
def test_a_budget_that_is_none_is_refused(bucket: Path, tmp_path: Path, budget: str) -> None:
    said = _download(_mix(tmp_path), bucket, tmp_path / "data", "--max-gb", budget, code=2)
    assert "a budget is more than 0" in said
