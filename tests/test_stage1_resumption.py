"""What lies in a folder already: whose it is, what of it counts, and what must not be written by two."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oxe_mix import fetch
from oxe_mix.cards import load_cards
from oxe_mix.engine import Engine
from oxe_mix.errors import UserError
from oxe_mix.fetch import fetch_shard
from oxe_mix.lock import LOCK_FILE, read_lock
from oxe_mix.mix import load_mix
from oxe_mix.plan import plan_download
from oxe_mix.schedule import schedule
from oxe_mix.shards import ShardTask
from oxe_mix.source_file import Patience, TransientError, pause
from oxe_mix.stage1 import DownloadOptions, run_download
from oxe_mix.target import open_target
from tests.conftest import OXE_MIX, run
from tests.loopback import FaultProxy, fault_at, web_server
from tests.test_download import _content

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six datasets of three shards each."""
    out = tmp_path_factory.mktemp("three") / "bucket"
    run(OXE_MIX, "synth", "--out", out, "--episodes", "24", "--shards", "3")
    return out


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def _mix(tmp_path: Path, **fractions: float) -> Path:
    file = tmp_path / f"{'-'.join(f'{name}{fraction:g}' for name, fraction in fractions.items())}.yaml"
    entries = "".join(
        f"- {{name: {name}, version: 0.1.0, fraction: {fraction}}}\n" for name, fraction in fractions.items()
    )
    file.write_text(f"name: m\ndatasets:\n{entries}")
    return file


def _options(mix: Path, source: Path | str, out: Path, **more: Any) -> DownloadOptions:
    return DownloadOptions(mix=mix, out=str(out), sources=(str(source),), **more)


def _get(mix: Path, source: Path | str, out: Path, **more: Any) -> int:
    return run_download(_options(mix, source, out, **more), Engine(workers=1))


def _tasks(mix: Path, source: Path | str, out: Path) -> list[ShardTask]:
    cards = load_cards()
    plans = plan_download(load_mix(mix, cards).with_source(str(source)), cards, Patience())
    return [one.task for one in schedule(plans, open_target(out), None)]


@contextmanager
def _without(file: Path) -> Iterator[None]:
    """A source that lacks a file for a while."""
    gone = file.rename(file.with_name(f"gone-{file.name}"))
    yield
    gone.rename(file)


def _shard(source: Path, name: str, index: int) -> Path:
    return sorted((source / name / "0.1.0").glob(f"{name}-train*"))[index]


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(capsys.readouterr())


# Whose data it is


def test_data_that_came_between_two_runs_is_refused_as_on_the_first(
    source: Path, copied: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    with _without(_shard(copied, "kuka", 1)):
        assert _get(_mix(tmp_path, kuka=1.0), copied, out) == 1
    shutil.copytree(source / "viola", out / "viola")
    before = _content(out)
    with pytest.raises(UserError, match=r"viola/0\.1\.0: holds data that no download here wrote"):
        _get(_mix(tmp_path, kuka=1.0, viola=0.3), copied, out)
    assert _content(out) == before


def test_data_of_a_dataset_that_is_under_way_is_refused_if_it_is_not_what_was_fetched(
    source: Path, copied: Path, tmp_path: Path
) -> None:
    out, mix = tmp_path / "data", _mix(tmp_path, kuka=1.0, viola=1.0)
    with _without(_shard(copied, "kuka", 1)):
        assert _get(mix, copied, out) == 1
    shutil.copytree(source / "viola", out / "viola")
    for file in (out / "viola/0.1.0").glob("viola-test*"):
        file.unlink()
    _shard(out, "viola", 0).write_bytes(_shard(source, "viola", 1).read_bytes())
    before = _content(out)
    with pytest.raises(UserError, match=r"viola/0\.1\.0: holds data that no download here wrote"):
        _get(mix, copied, out)
    assert _content(out) == before


def test_the_source_itself_as_the_target_of_an_unfinished_download_is_refused(
    source: Path, tmp_path: Path
) -> None:
    """A folder of the user's that holds viola, and is to get kuka from elsewhere."""
    mine = tmp_path / "mine"
    shutil.copytree(source / "viola", mine / "viola")
    kuka = Path(shutil.copytree(source / "kuka", tmp_path / "other/kuka")).parent
    with _without(_shard(kuka, "kuka", 1)):
        assert _get(_mix(tmp_path, kuka=1.0), kuka, mine) == 1
    mix, before = _mix(tmp_path, kuka=1.0, viola=0.3), _content(mine / "viola")
    options = replace(_options(mix, kuka, mine), sources=(str(kuka), str(mine)))
    with pytest.raises(UserError, match="holds data that no download here wrote"):
        run_download(options, Engine(workers=1))
    assert _content(mine / "viola") == before


def test_a_finished_download_does_not_grow_from_itself(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert _get(_mix(tmp_path, viola=0.5), source, out) == 0
    before = _content(out)
    options = replace(_options(_mix(tmp_path, viola=0.8), "", out), sources=(str(out), str(source)))
    with pytest.raises(UserError, match=r"changed at the source|is the source itself"):
        run_download(options, Engine(workers=1))
    assert _content(out) == before
    whole = _mix(tmp_path, viola=1.0)
    assert _get(whole, source, out) == 0
    before, options = _content(out), replace(options, mix=whole)
    with pytest.raises(UserError, match="is the source itself"):
        run_download(options, Engine(workers=1))
    assert _content(out) == before


def test_a_first_download_killed_while_names_change_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oxe_mix.target import LocalTarget

    mix, whole = _mix(tmp_path, kuka=1.0, viola=0.7), tmp_path / "whole"
    assert _get(mix, source, whole) == 0
    for step, left in (("rename", 2), ("rename", 4), ("write", 11)):
        out, call, seen = tmp_path / f"{step}{left}", getattr(LocalTarget, step), list[str]()

        def dying(*args: Any, call: Any = call, left: int = left, seen: list[str] = seen) -> None:
            if len(seen) == left:
                raise KeyboardInterrupt
            seen.append(str(args))
            call(*args)

        with monkeypatch.context() as patch:
            patch.setattr(LocalTarget, step, dying)
            with pytest.raises(KeyboardInterrupt):
                _get(mix, source, out)
        assert list(out.glob("kuka/0.1.0/*"))
        assert _get(mix, source, out) == 0
        assert _content(out) == _content(whole)


# Two processes


def _with_mark(mark: str) -> list[int]:
    """The living processes that inherited a variable."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"OXE_TEST={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # gone, or not ours
    return found


def test_the_workers_of_a_killed_command_end_and_the_next_one_goes_on(source: Path, tmp_path: Path) -> None:
    mix, out = _mix(tmp_path, kuka=1.0, viola=1.0), tmp_path / "data"
    command = list(map(str, [OXE_MIX, "download", "--mix", mix, "--out", out, "--workers", "2"]))
    with web_server(source) as endpoint, FaultProxy(endpoint, fault_at("tfrecord", "stall")) as proxy:
        command += ["--source", proxy.endpoint]
        for name in ("SIGKILL", "SIGTERM"):
            mark, before = f"{os.getpid()}-{name}", len(proxy.media)
            env = {**os.environ, "OXE_TEST": mark}
            first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(proxy.media) == before:
                assert first.poll() is None
                time.sleep(0.05)
            first.send_signal(getattr(signal, name))
            # Not collected yet: what ends the workers must see that a zombie is gone.
            until = time.monotonic() + 60
            while (alive := set(_with_mark(mark)) - {first.pid}) and time.monotonic() < until:
                time.sleep(0.1)
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            first.wait()
            assert not alive, name
        proxy.plan = fault_at("tfrecord", "stall", times=0)
        again = run(*command, code=0)
        assert "result:" in again.stdout
        assert all(line.startswith("download: ") for line in again.stderr.splitlines())
        assert _get(mix, proxy.endpoint, tmp_path / "whole") == 0
    assert _content(out) == _content(tmp_path / "whole")


def test_a_shard_that_another_process_writes_is_left_to_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_LONGEST_WAIT_S", 0.2)
    task = _tasks(_mix(tmp_path, viola=1.0), source, tmp_path / "data")[0]
    part = tmp_path / "data" / f"{task.name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half of what the other one has")
    with part.with_suffix(".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process still writes this shard"):
            fetch_shard(task, Patience())
    assert part.read_bytes() == b"half of what the other one has"
    part.unlink()
    assert fetch_shard(task, Patience()).episodes == task.episodes


def test_a_bundle_that_is_run_again_fetches_nothing_twice(source: Path, tmp_path: Path) -> None:
    with web_server(source) as endpoint, FaultProxy(endpoint) as proxy:
        first, second, *_ = _tasks(_mix(tmp_path, viola=1.0), proxy.endpoint, tmp_path / "data")
        report = fetch_shard(first, Patience())
        assert len(proxy.media) == 1
        again = fetch_shard(first, Patience())
        assert replace(report, fetched_bytes=0) == replace(again, fetched_bytes=0)
        assert len(proxy.media) == 1
        # But only if the file is there, and whole.
        fetch_shard(second, Patience())
        for task, change in ((first, Path.unlink), (second, lambda file: os.truncate(file, 100))):
            before = len(proxy.media)
            change(tmp_path / "data" / task.name)
            fetch_shard(task, Patience())
            assert len(proxy.media) == before + 1


# What is whole


def _lost(file: Path) -> None:
    file.unlink()


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _of_the_source(file: Path) -> None:
    """As a copy of the source's own would have it: with other shards."""
    file.write_text(file.read_text().replace('"shardLengths": [', '"shardLengths": ["1", '))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dataset_info.json", _lost),
        ("dataset_info.json", _cut),
        ("dataset_info.json", _of_the_source),
        ("features.json", _lost),
        ("features.json", _cut),
    ],
)
def test_metadata_that_is_gone_or_broken_is_written_again(
    source: Path, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    mix, out = _mix(tmp_path, viola=0.5), tmp_path / "data"
    assert _get(mix, source, out) == 0
    before = _content(out)
    change(out / "viola/0.1.0" / name)
    assert _content(out) != before
    assert _get(mix, source, out) == 0
    assert _content(out) == before


def test_metadata_that_mods_changed_is_whole(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix, out = _mix(tmp_path, viola=0.3), tmp_path / "data"
    mix.write_text(mix.read_text().replace("0.3}", "0.3, mods: [{resize: 50}]}"))
    assert _get(mix, source, out) == 0
    assert (out / "viola/0.1.0/features.json").read_bytes() != (
        source / "viola/0.1.0/features.json"
    ).read_bytes()
    _said(capsys)
    assert _get(mix, source, out) == 0
    assert "nothing to do" in _said(capsys)


def test_what_an_abandoned_growth_left_is_told(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, small, large = tmp_path / "data", _mix(tmp_path, viola=0.3), _mix(tmp_path, viola=1.0)
    assert _get(small, copied, out) == 0
    lost = _tasks(large, copied, tmp_path / "none")[1].urls[0]
    with _without(Path(lost)):
        assert _get(large, copied, out) == 1
    left = [file for file in (out / ".partial").rglob("*.tfrecord") if file.is_file()]
    assert left
    _said(capsys)
    assert _get(small, copied, out) == 0
    said = _said(capsys)
    assert "nothing to do" in said
    assert f"{out}/.partial holds" in said
    assert "kB of a larger mix that was not finished" in said
    assert all(file.exists() for file in left)
    assert _get(large, copied, out) == 0
    assert not (out / ".partial").exists()


def test_what_a_finished_download_could_not_remove_is_removed_by_the_next(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oxe_mix import stage1

    mix, out = _mix(tmp_path, viola=0.3), tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(stage1, "clean_up", lambda *_: None)
        assert _get(mix, source, out) == 0
    assert list((out / ".partial").rglob("*.json"))
    assert _get(mix, source, out) == 0
    assert not (out / ".partial").exists()


# A dry run, and the disk


def test_a_dry_run_says_what_the_run_would(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, small, large = tmp_path / "data", _mix(tmp_path, viola=0.3), _mix(tmp_path, viola=1.0)
    assert _get(large, source, out) == 0
    before = _content(out)
    _said(capsys)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 0))
        assert _get(large, source, out, dry_run=True) == 0
    assert "nothing to do" in _said(capsys)
    with pytest.raises(UserError, match=r"viola shrinks from 1 to 0\.3"):
        _get(small, source, out, dry_run=True)
    shutil.copytree(source / "viola", tmp_path / "foreign/viola")
    with pytest.raises(UserError, match="holds data that no download here wrote"):
        _get(small, source, tmp_path / "foreign", dry_run=True)
    assert _content(out) == before
    grown = _mix(tmp_path, viola=1.0, kuka=1.0)
    _said(capsys)
    assert _get(grown, source, out, dry_run=True) == 0
    kuka = sum(file.stat().st_size for file in (source / "kuka/0.1.0").glob("*.tfrecord-*"))
    assert f"still to fetch about {kuka / 1e3:.1f} kB" in _said(capsys)
    assert _content(out) == before


def test_a_dry_run_beside_a_download_is_not_refused(source: Path, tmp_path: Path) -> None:
    from oxe_mix.files import folder_lock

    with folder_lock(tmp_path / "data", "download"):
        assert _get(_mix(tmp_path, viola=0.3), source, tmp_path / "data", dry_run=True) == 0


@pytest.mark.parametrize("what", ["part", "reboot"])
def test_the_disk_needs_to_hold_only_what_is_not_there_yet(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out, mix = tmp_path / "data", _mix(tmp_path, viola=1.0)
    names = [task.urls[0].rsplit("/", 1)[-1] for task in _tasks(mix, source, out)]
    fault = fault_at(names[1], "truncated", times=1) if what == "part" else fault_at(names[1], "404", times=1)
    with web_server(source) as endpoint, FaultProxy(endpoint, fault) as proxy:
        assert _get(mix, proxy.endpoint, out, patience=Patience(0)) == 1
        if what == "reboot":
            for note in out.rglob("*.tfrecord.json"):
                note.write_text(note.read_text().replace('"boot": "', '"boot": "another'))
        # There is no listing here, so sizes are estimates.
        total = sum((source / "viola/0.1.0" / name).stat().st_size for name in names)
        here = sum(num for name, num in open_target(out).sizes(".partial").items() if ".json" not in name)
        free = round((total - here) * 1.05)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, free))
        assert _get(mix, proxy.endpoint, out) == 0


# What binds a folder


def test_a_runner_that_cannot_be_does_not_bind_the_folder(source: Path, tmp_path: Path) -> None:
    out, small, other = tmp_path / "data", _mix(tmp_path, viola=0.3), _mix(tmp_path, kuka=0.3)
    for dry_run in (True, False):
        with pytest.raises(UserError, match="--runner Nope"):
            run_download(_options(small, source, out, dry_run=dry_run), Engine("Nope"))
    assert not (out / LOCK_FILE).exists()
    assert _get(other, source, out) == 0


def test_a_lock_with_nothing_fetched_gives_way_to_another_mix(
    source: Path, copied: Path, tmp_path: Path
) -> None:
    out, first, other = tmp_path / "data", _mix(tmp_path, viola=1.0), _mix(tmp_path, kuka=0.3)
    for file in (copied / "viola/0.1.0").glob("*.tfrecord-*"):
        file.unlink()
    assert _get(first, copied, out) == 1
    assert (out / LOCK_FILE).exists()
    assert _get(other, source, out) == 0
    lock = read_lock(out)
    assert lock is not None
    assert [spec.name for spec in lock.mix.datasets] == ["kuka"]


def test_a_lock_with_a_shard_fetched_does_not(source: Path, copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    with _without(_shard(copied, "viola", 1)):
        assert _get(_mix(tmp_path, viola=1.0), copied, out) == 1
    with pytest.raises(UserError, match="is no longer in the mix"):
        _get(_mix(tmp_path, kuka=0.3), copied, out)


# Mirrors, notes, waits


def test_a_mirror_with_other_entity_tags_goes_on_where_the_first_copy_broke_off(
    source: Path, copied: Path, tmp_path: Path
) -> None:
    for file in copied.rglob("*.tfrecord-*"):
        os.utime(file, (0, 0))  # its tag is made of this
    mix, out = _mix(tmp_path, viola=1.0), tmp_path / "data"
    with (
        web_server(source) as a,
        web_server(copied) as b,
        FaultProxy(a, fault_at("viola-train", "truncated")) as one,
        FaultProxy(b) as two,
    ):
        task = replace(_tasks(mix, one.endpoint, out)[0])
        task = replace(task, urls=(task.urls[0], task.urls[0].replace(one.endpoint, two.endpoint)))
        fetch_shard(task, Patience(0))
        assert [request.headers.get("Range", "bytes=0-") for request in one.media] == ["bytes=0-"]
        assert [request.headers.get("Range", "bytes=0-") for request in two.media] != ["bytes=0-"]
    file = source / "viola/0.1.0" / task.urls[0].rsplit("/", 1)[-1]
    assert (out / task.name).read_bytes() == file.read_bytes()


def test_a_download_from_mirrors_grows_from_the_other(source: Path, copied: Path, tmp_path: Path) -> None:
    """A lock holds the tag of the server that gave it; another server's is not a change."""
    for file in copied.rglob("*.tfrecord-*"):
        os.utime(file, (0, 0))
    out = tmp_path / "data"
    with web_server(source) as a, web_server(copied) as b:
        for fraction, places in ((0.2, (a, b)), (0.5, (b,)), (1.0, (a, b))):
            options = replace(_options(_mix(tmp_path, viola=fraction), "", out), sources=places)
            assert run_download(options, Engine(workers=1)) == 0
        assert _get(_mix(tmp_path, viola=1.0), a, tmp_path / "whole") == 0
    one, two = _content(out), _content(tmp_path / "whole")
    one.pop(LOCK_FILE), two.pop(LOCK_FILE)
    assert one == two


@pytest.mark.parametrize("text", ["null", "[]", "{", '{"report": null}', '{"size": 3, "more": 1}', "3"])
def test_a_note_or_an_origin_that_is_not_ours_counts_as_absent(
    source: Path, tmp_path: Path, text: str
) -> None:
    mix, out = _mix(tmp_path, viola=1.0), tmp_path / "data"
    with web_server(source) as endpoint, FaultProxy(endpoint, fault_at("00001-of-", "truncated", 1)) as proxy:
        assert _get(mix, proxy.endpoint, out, patience=Patience(0)) == 1
        (origin,) = out.rglob("*.origin")
        for file in (origin, *out.rglob("*.tfrecord.json")):
            file.write_text(text)
        assert _get(mix, proxy.endpoint, out) == 0
        assert _get(mix, proxy.endpoint, tmp_path / "whole") == 0
    assert _content(out) == _content(tmp_path / "whole")


def test_waits_do_not_overflow_and_tries_are_spelt(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", waits.append)
        pause(5000, TransientError("HTTP 503"))
    assert 60 <= waits[0] <= 90
    with web_server(source) as endpoint, FaultProxy(endpoint, fault_at("viola-train", "503")) as proxy:
        for retries, words in ((0, "(0 more tries)"), (1, "(1 more try)"), (2, "(2 more tries)")):
            out = tmp_path / f"data{retries}"
            assert _get(_mix(tmp_path, viola=0.3), proxy.endpoint, out, patience=Patience(retries)) == 1
            assert f"not fetched: HTTP 503 {words}" in _said(capsys)
