"""Stage 1: exact, proved, valid for TFDS, the same after any interruption."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from oxe_mix.lock import read_lock
from oxe_mix.rlds import parse_dataset_info
from oxe_mix.tfrecord import FRAME_BYTES, frame, read_records
from tests.conftest import OXE_MIX, run

MIX = """\
name: small
seed: {seed}
datasets:
- {{name: viola, version: 0.1.0, fraction: {viola}}}
- {{name: bridge_orig, version: 1.0.0, fraction: {bridge}}}
- {{name: viola, version: 0.1.0, fraction: 1, split: test}}
"""


def _mix(tmp_path: Path, viola: float = 0.5, bridge: float = 0.4, seed: int = 0) -> Path:
    file = tmp_path / "mix.yaml"
    file.write_text(MIX.format(viola=viola, bridge=bridge, seed=seed))
    return file


def _download(mix: Path, bucket: Path | str, out: Path, *more: str, code: int = 0) -> str:
    done = run(
        OXE_MIX,
        "download",
        "--mix",
        mix,
        "--source",
        bucket,
        "--out",
        out,
        "--workers",
        "1",
        *more,
        code=code,
    )
    return done.stdout + done.stderr


def _content(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its bytes; where the lock says who locked it does not
    count.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".oxe-mix.busy"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _payloads(file: Path) -> list[bytes]:
    with file.open("rb") as stream:
        return [record.payload for record in read_records(stream, str(file))]


def test_every_record_on_disk_is_the_sources_and_the_lock_says_which(bucket: Path, data: Path) -> None:
    lock = read_lock(data)
    assert lock is not None
    assert lock.complete
    num = 0
    for dataset in lock.datasets:
        info = parse_dataset_info((data / dataset.folder / "dataset_info.json").read_text(), "")
        for split in dataset.splits:
            on_disk = info.splits[split.split]
            assert on_disk.shard_lengths == tuple(shard.episodes for shard in split.shards)
            files = [data / dataset.folder / shard.file for shard in split.shards]
            assert on_disk.num_bytes == sum(
                file.stat().st_size - FRAME_BYTES * n
                for file, n in zip(files, on_disk.shard_lengths, strict=True)
            )
            for file, shard in zip(files, split.shards, strict=True):
                source = _payloads(Path(dataset.source) / shard.source_file)
                assert len(source) == shard.of_episodes
                assert _payloads(file) == source[: shard.episodes]
                assert google_crc32c.Checksum(file.read_bytes()).hexdigest().decode() == shard.crc32c
                num += 1
    assert num > 20


def test_tfds_reads_what_was_downloaded_record_for_record(bucket: Path, data: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra tf")
    import numpy as np
    import tensorflow_datasets as tfds

    lock = read_lock(data)
    assert lock is not None
    for dataset in lock.datasets:
        ours = tfds.builder_from_directory(str(data / dataset.folder))
        theirs = tfds.builder_from_directory(dataset.source)
        assert list(ours.info.splits) == ["train"]
        split = dataset.splits[0]
        reading = tfds.ReadConfig(interleave_cycle_length=1)
        mine = list(tfds.as_numpy(ours.as_dataset(split="train", read_config=reading)))
        assert len(mine) == split.episodes
        source = theirs.as_dataset(split="train", read_config=reading)
        by_shard = _split_by(list(tfds.as_numpy(source)), theirs.info.splits["train"].shard_lengths)
        expected = [e for shard in split.shards for e in by_shard[shard.source_shard][: shard.episodes]]
        for one, other in zip(mine, expected, strict=True):
            mine_steps, their_steps = list(one["steps"]), list(other["steps"])
            assert len(mine_steps) == len(their_steps)
            for a, b in zip(mine_steps, their_steps, strict=True):
                np.testing.assert_equal(a, b)


def _split_by(values: list[Any], lengths: list[int]) -> list[list[Any]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(values[start : start + length])
        start += length
    return parts


def test_a_second_run_does_nothing(bucket: Path, tmp_path: Path) -> None:
    mix, out = _mix(tmp_path), tmp_path / "data"
    _download(mix, bucket, out)
    before = {
        file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and "busy" not in file.name
    }
    said = _download(mix, bucket, out)
    assert "nothing to do" in said
    assert before == {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and "busy" not in f.name}


def test_a_dry_run_prints_the_plan_and_writes_nothing(bucket: Path, tmp_path: Path) -> None:
    said = _download(_mix(tmp_path), bucket, tmp_path / "data", "--dry-run")
    assert "16 of 31" in said  # round(0.5 x 31): Python's round
    assert not (tmp_path / "data").exists()


def test_a_file_url_is_as_good_as_a_folder(bucket: Path, tmp_path: Path) -> None:
    mix = _mix(tmp_path)
    _download(mix, bucket, tmp_path / "one")
    run(
        OXE_MIX,
        "download",
        "--mix",
        mix,
        "--source",
        f"file://{bucket}",
        "--out",
        tmp_path / "two",
        "--workers",
        "1",
    )
    one, two = _content(tmp_path / "one"), _content(tmp_path / "two")
    assert one.pop("oxe-mix.lock.json") != two.pop("oxe-mix.lock.json")  # it names the source
    assert one == two


def test_growing_a_mix_keeps_what_is_there_and_equals_a_fresh_download(bucket: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "data", tmp_path / "fresh"
    small, large = _mix(tmp_path, viola=0.3, bridge=0.2), tmp_path / "large.yaml"
    large.write_text(_mix(tmp_path, viola=0.7, bridge=0.2).read_text())
    small = _mix(tmp_path, viola=0.3, bridge=0.2)
    _download(small, bucket, out)
    old = {int(f.name.split("-")[-3]): f for f in (out / "viola/0.1.0").glob("viola-train*")}
    first = old[0].stat().st_ino
    said = _download(large, bucket, out)
    grown = sorted((out / "viola/0.1.0").glob("viola-train*"))
    assert len(grown) > len(old)
    assert grown[0].stat().st_ino == first  # renamed, not fetched again
    assert "fetched 3 shards" in said  # two new ones and the one that had been taken in part
    _download(large, bucket, fresh)
    assert _content(out) == _content(fresh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"viola": 0.4}, "viola shrinks from 0.5 to 0.4"),
        ({"seed": 1}, "seed 1 instead of 0"),
    ],
)
def test_a_mix_that_does_not_grow_the_one_on_disk_is_refused(
    bucket: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "data"
    _download(_mix(tmp_path), bucket, out)
    before = _content(out)
    assert message in _download(_mix(tmp_path, **change), bucket, out, code=2)
    assert _content(out) == before


def test_a_damaged_shard_is_named_and_does_not_lose_the_others(bucket: Path, tmp_path: Path) -> None:
    source, out, mix = tmp_path / "bucket", tmp_path / "data", _mix(tmp_path, viola=1.0, bridge=1.0)
    shutil.copytree(bucket, source)
    shard = sorted((source / "viola/0.1.0").glob("viola-train*"))[2]
    whole = shard.read_bytes()
    offset = len(whole) - 100
    shard.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
    said = _download(mix, source, out, code=1)
    assert f"{shard}: record " in said
    assert "the checksum of the data is wrong" in said
    assert "11 of 12 shards fetched" in said
    assert not list(out.glob("viola/0.1.0/*"))  # nothing that could be taken for a dataset
    shard.write_bytes(whole)
    assert "fetched 1 shard," in _download(mix, source, out)
    _download(mix, source, tmp_path / "fresh")
    assert _content(out) == _content(tmp_path / "fresh")


def test_a_shard_with_records_missing_is_refused(bucket: Path, tmp_path: Path) -> None:
    source, mix = tmp_path / "bucket", _mix(tmp_path, viola=1.0)
    shutil.copytree(bucket, source)
    shard = sorted((source / "viola/0.1.0").glob("viola-train*"))[1]
    shard.write_bytes(b"".join(map(frame, _payloads(shard)[:-1])))
    assert "records, dataset_info.json says" in _download(mix, source, tmp_path / "data", code=1)


def test_killed_at_seeded_moments_and_started_again_the_result_is_the_same(
    bucket: Path, tmp_path: Path
) -> None:
    mix, undisturbed, out = _mix(tmp_path, viola=1.0, bridge=1.0), tmp_path / "undisturbed", tmp_path / "data"
    start = time.monotonic()
    _download(mix, bucket, undisturbed)
    seconds = time.monotonic() - start
    rng = random.Random(0)
    command = [
        OXE_MIX,
        "download",
        "--mix",
        str(mix),
        "--source",
        str(bucket),
        "--out",
        str(out),
        "--workers",
        "1",
    ]
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * rng.uniform(0.5, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    _download(mix, bucket, out)
    assert _content(out) == _content(undisturbed)


def test_finishing_can_be_killed_between_any_two_renames(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renames of a grown mix, cut off after each one in turn: the next run ends with the same bytes."""
    small, large = _mix(tmp_path, viola=0.3, bridge=0.2), tmp_path / "large.yaml"
    start, fresh = tmp_path / "start", tmp_path / "fresh"
    _download(small, bucket, start)
    large.write_text(_mix(tmp_path, viola=0.9, bridge=0.4).read_text())
    _download(large, bucket, fresh)
    expected = _content(fresh)

    from oxe_mix import stage1
    from oxe_mix.engine import Engine
    from oxe_mix.stage1 import DownloadOptions, run_download
    from oxe_mix.target import LocalTarget

    rename, write = LocalTarget.rename, LocalTarget.write
    for survive in range(0, 12, 2):
        out, left = tmp_path / f"data{survive}", [survive]
        shutil.copytree(start, out)

        def dying(call: Any, left: list[int] = left) -> Any:
            def step(*args: Any) -> None:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                call(*args)

            return step

        # Fetching is done by the first call, so that what is cut off are the renames and writes of the end.
        options = DownloadOptions(mix=large, out=str(out), sources=(str(bucket),))
        with monkeypatch.context() as patch:
            patch.setattr(stage1, "finish_download", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_download(options, Engine(workers=1))
        with monkeypatch.context() as patch:
            patch.setattr(LocalTarget, "rename", dying(rename))
            patch.setattr(LocalTarget, "write", dying(write))
            with pytest.raises(KeyboardInterrupt):
                run_download(options, Engine(workers=1))
        assert run_download(options, Engine(workers=1)) == 0
        assert _content(out) == expected, survive


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_data_that_no_download_wrote_is_left_alone(bucket: Path, tmp_path: Path) -> None:
    """A full copy without a lock, or the source itself, given as --out."""
    source = tmp_path / "bucket"
    shutil.copytree(bucket, source)
    before = _content(source)
    mix = tmp_path / "mix.yaml"
    mix.write_text("name: m\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 0.4}\n")
    assert "holds data that no download here wrote" in _download(mix, source, source, code=2)
    assert _content(source) == before


@pytest.mark.parametrize("num_shards", [2, 8])
def test_a_source_that_was_cut_anew_is_refused_and_nothing_is_lost(
    bucket: Path, tmp_path: Path, num_shards: int
) -> None:
    """The same records in other shards: growing would mix old and new, and give some of them twice."""
    source, out = tmp_path / "bucket", tmp_path / "data"
    shutil.copytree(bucket / "viola", source / "viola")
    mix = tmp_path / "mix.yaml"
    text = "name: m\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 0.5}\n"
    mix.write_text(text)
    _download(mix, source, out)
    before = _content(out)
    folder = source / "viola/0.1.0"
    payloads = [p for file in sorted(folder.glob("viola-train*")) for p in _payloads(file)]
    for file in folder.glob("viola-train*"):
        file.unlink()
    lengths = [len(payloads[i::num_shards]) for i in range(num_shards)]
    for i in range(num_shards):
        (folder / f"viola-train.tfrecord-{i:05d}-of-{num_shards:05d}").write_bytes(
            b"".join(map(frame, payloads[i::num_shards]))
        )
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(n) for n in lengths]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    mix.write_text(text.replace("0.5", "0.8"))
    said = _download(mix, source, out, code=2)
    assert f"changed at the source since {out} was downloaded" in said
    assert _content(out) == before
    _download(mix, source, tmp_path / "fresh")


def test_a_shard_that_cannot_be_opened_does_not_lose_the_others(bucket: Path, tmp_path: Path) -> None:
    source, out, mix = tmp_path / "bucket", tmp_path / "data", _mix(tmp_path, viola=1.0, bridge=1.0)
    shutil.copytree(bucket, source)
    shard = sorted((source / "viola/0.1.0").glob("viola-train*"))[2]
    shard.unlink()
    shard.mkdir()
    said = _download(mix, source, out, code=1)
    assert f"{shard}: cannot be read (IsADirectoryError" in said
    assert "11 of 12 shards fetched" in said


def test_a_worker_that_cannot_start_ends_the_command(bucket: Path, tmp_path: Path) -> None:
    """Beam alone would wait for it for ever."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif '-m' in sys.orig_argv and 'pipelines.worker' in sys.orig_argv: raise SystemExit(3)\n"
    )
    command = [OXE_MIX, "download", "--mix", _mix(tmp_path), "--source", bucket, "--out", tmp_path / "data"]
    done = subprocess.run(
        [*map(str, command), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "a worker process ended early" in done.stderr


def test_two_downloads_into_one_folder_do_not_meet(bucket: Path, tmp_path: Path) -> None:
    from oxe_mix.files import folder_lock

    with folder_lock(tmp_path / "data", "download"):
        assert "another download is writing here" in _download(
            _mix(tmp_path), bucket, tmp_path / "data", code=2
        )


def test_a_card_that_does_not_fit_the_source_stops_before_any_byte(bucket: Path, tmp_path: Path) -> None:
    from oxe_mix.cards import SHIPPED

    own = tmp_path / "cards"
    own.mkdir()
    text = (SHIPPED / "viola.yaml").read_text().replace("rotation_delta", "rotation")
    (own / "viola.yaml").write_text(text)
    said = _download(_mix(tmp_path), bucket, tmp_path / "data", "--cards", str(own), code=2)
    assert f"{own / 'viola.yaml'}:" in said
    assert "no feature action/rotation" in said
    assert not list((tmp_path / "data").rglob("*.*record*"))


def test_names_from_a_buckets_metadata_cannot_leave_the_target(bucket: Path, tmp_path: Path) -> None:
    source = tmp_path / "bucket"
    shutil.copytree(bucket / "viola", source / "viola")
    file = source / "viola/0.1.0/dataset_info.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "name": "../../evil"}))
    said = _download(_mix(tmp_path), source, tmp_path / "data", code=2)
    assert "'../../evil' is no name for a file" in said
    assert not list(tmp_path.rglob("*evil*"))
