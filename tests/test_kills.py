"""Killed at any moment and started again: the same bytes. And two downloads, full disks, closed folders."""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oxe_mix.cards import load_cards
from oxe_mix.mix import load_mix
from oxe_mix.plan import plan_download
from oxe_mix.schedule import schedule
from oxe_mix.source_file import Patience
from oxe_mix.target import open_target
from tests.conftest import OXE_MIX, PYTHON, ROOT
from tests.loopback import FaultProxy, fault_at, web_server
from tests.test_download import _content, _download, _mix

# What a worker does, and nothing else: fetch the shards of a list one after another.
WORKER = """
import pickle, sys
from pathlib import Path
from oxe_mix.fetch import fetch_shard
from oxe_mix.source_file import Patience
tasks = pickle.loads(Path(sys.argv[1]).read_bytes())
print("ready", flush=True)
for task in tasks:
    fetch_shard(task, Patience())
print("done", flush=True)
"""
KILLS = 16


def _start_worker(tasks: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(tasks)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    return worker


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


@pytest.mark.parametrize("mods", ["", "{resize: 200}"], ids=["copied", "with mods"])
def test_a_worker_killed_at_seeded_moments_leaves_what_the_next_one_goes_on_with(
    bucket: Path, tmp_path: Path, mods: str
) -> None:
    mix, out, whole = tmp_path / "mix.yaml", tmp_path / "data", tmp_path / "whole"
    entry = f"{{name: bridge_orig, version: 1.0.0, fraction: 0.9, mods: [{mods}]}}"
    mix.write_text(f"name: m\ndatasets:\n- {entry}\n")
    rng = random.Random(len(mods))
    # Slow enough that most kills hit a transfer: 2.7 MB in a second.
    with web_server(bucket) as endpoint, FaultProxy(endpoint, bytes_per_s=3e6) as proxy:
        _download(mix, proxy.endpoint, whole)
        out.mkdir()
        cards = load_cards()
        asked = load_mix(mix, cards).with_source(proxy.endpoint)
        plans = plan_download(asked, cards, Patience())
        tasks, kept = tmp_path / "tasks.pickle", []
        tasks.write_bytes(pickle.dumps([one.task for one in schedule(plans, open_target(str(out)), None)]))
        for _ in range(KILLS):
            worker = _start_worker(tasks)
            time.sleep(rng.uniform(0.0, 0.35))
            _kill(worker)
            kept.append(sum(open_target(str(out)).sizes(".partial").values()))
        assert max(kept) > 0
        before = len(proxy.media)
        _download(mix, proxy.endpoint, out)
        assert len(proxy.media) - before <= len(plans[0].picks)
    assert _content(out) == _content(whole)


def test_the_whole_command_killed_at_seeded_moments_ends_with_the_same_bytes(
    bucket: Path, tmp_path: Path
) -> None:
    mix, whole, out = _mix(tmp_path, viola=1.0, bridge=1.0), tmp_path / "whole", tmp_path / "data"
    start = time.monotonic()
    _download(mix, bucket, whole)
    seconds = time.monotonic() - start
    rng = random.Random(0)
    command = [OXE_MIX, "download", "--mix", mix, "--source", bucket, "--out", out]
    for workers in ("1", "1", "2", "2"):
        process = subprocess.Popen(
            [*map(str, command), "--workers", workers],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        time.sleep(seconds * rng.uniform(0.5, 1.0))
        _kill(process)
        # Worker processes of a killed command notice that it is gone, and end.
    _download(mix, bucket, out)
    assert _content(out) == _content(whole)


# A machine so busy that the workers have ended, and Beam has seen it, before the command hears of Ctrl-C.
_HEARS_LATE = """
import time, oxe_mix.run_app
usual = oxe_mix.run_app.end_at_once
oxe_mix.run_app.end_at_once = lambda *about: (time.sleep(0.7), usual(*about))
from oxe_mix.cli import main
main()
"""


@pytest.mark.parametrize(
    ("start", "workers"), [((OXE_MIX,), "1"), ((OXE_MIX,), "2"), ((PYTHON, "-c", _HEARS_LATE), "2")]
)
def test_ctrl_c_ends_it_at_once_with_one_line_and_the_next_run_goes_on(
    bucket: Path, tmp_path: Path, start: tuple[str | Path, ...], workers: str
) -> None:
    mix, out = _mix(tmp_path, viola=0.3, bridge=1.0), tmp_path / "data"
    with web_server(bucket) as endpoint, FaultProxy(endpoint, bytes_per_s=0.1e6) as proxy:
        command = [*start, "download", "--mix", mix, "--source", proxy.endpoint, "--out", out]
        process = subprocess.Popen(
            [*map(str, command), "--workers", workers],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while sum(open_target(out).sizes(".partial").values()) < 100_000:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        lines = [line for line in said.splitlines() if not line.startswith("download: ")]
        assert lines == ["error: interrupted; the same command goes on from here"]
        kept = sum(open_target(out).sizes(".partial").values())
        proxy.bytes_per_s = None
        said = _download(mix, proxy.endpoint, out)
        assert kept > 0
        assert "done" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _without_super_powers() -> None:
    """Root may write everywhere; a child without CAP_DAC_OVERRIDE may not."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_disk_that_is_too_small_is_refused_before_any_byte(
    bucket: Path, tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(b"x" * 100_000)
    said = _download(_mix(tmp_path, viola=0.5, bridge=0.4), bucket, small_disk / "data", code=2)
    assert "the disk would not hold this: 1." in said
    assert not list(small_disk.glob("data/.partial"))


def test_space_that_runs_out_under_way_is_told_once_and_mended_by_another_run(
    bucket: Path, tmp_path: Path, small_disk: Path
) -> None:
    """The plan fits when it is made; then somebody else fills the disk."""
    mix, out = _mix(tmp_path, viola=0.2, bridge=0.2), small_disk / "data"
    filler = small_disk / "filler"
    with web_server(bucket) as endpoint, FaultProxy(endpoint, bytes_per_s=2e4) as proxy:
        command = [
            OXE_MIX,
            "download",
            "--mix",
            mix,
            "--source",
            proxy.endpoint,
            "--out",
            out,
            "--workers",
            "1",
        ]
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while not list(out.rglob("*.part")) and process.poll() is None:
            time.sleep(0.005)
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4096"], capture_output=True, check=False)
        said = process.communicate()[1]
        assert process.returncode == 1, said
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert errors == [
            f"error: {out}: the disk is full; free some space and run again: what is whole is kept"
        ]
        filler.unlink()
        _download(mix, proxy.endpoint, out)
        _download(mix, proxy.endpoint, tmp_path / "whole")
    assert _content(out) == _content(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_one_line(bucket: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    command = [OXE_MIX, "download", "--mix", _mix(tmp_path), "--source", bucket, "--out", closed / "data"]
    done = subprocess.run(
        list(map(str, command)),
        preexec_fn=_without_super_powers,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {closed / 'data'}: cannot write here (Permission denied); choose another folder\n"
    )


def test_a_read_only_disk_is_one_line(bucket: Path, tmp_path: Path, small_disk: Path) -> None:
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    said = _download(_mix(tmp_path), bucket, small_disk / "data", code=2)
    assert said.endswith("cannot write here (Read-only file system); choose another folder\n")


def test_the_second_of_two_downloads_into_one_folder_is_refused(bucket: Path, tmp_path: Path) -> None:
    mix, out = _mix(tmp_path, viola=0.3, bridge=0.3), tmp_path / "data"
    with web_server(bucket) as endpoint, FaultProxy(endpoint, bytes_per_s=2e4) as proxy:
        command = [
            OXE_MIX,
            "download",
            "--mix",
            mix,
            "--source",
            proxy.endpoint,
            "--out",
            out,
            "--workers",
            "1",
        ]
        first = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        while not (out / "oxe-mix.lock.json").exists():
            assert first.poll() is None
            time.sleep(0.01)
        said = _download(mix, bucket, out, code=2)
        proxy.bytes_per_s = None
        assert f"{out}: another download is writing here" in said
        assert first.communicate()[0].count("result:") == 1
        assert first.returncode == 0


def test_links_in_the_target_do_not_lead_out_of_it(bucket: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "viola").symlink_to(elsewhere)
    said = _download(_mix(tmp_path), bucket, out, code=2)
    assert "leads out of" in said
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("lost", [False, True])
def test_after_the_machine_started_anew_what_waited_is_read_again_before_it_is_trusted(
    bucket: Path, tmp_path: Path, lost: bool
) -> None:
    """Notes of another start of the machine; of one shard the disk has lost a block."""
    mix, out, whole = _mix(tmp_path, viola=1.0, bridge=1.0), tmp_path / "data", tmp_path / "whole"
    _download(mix, bucket, whole)
    with web_server(bucket) as endpoint, FaultProxy(endpoint, fault_at("viola-test", "404")) as proxy:
        _download(mix, proxy.endpoint, out, code=1)
        notes = sorted(out.glob(".partial/**/*.tfrecord.json"))
        assert len(notes) == 10
        for note in notes:
            note.write_text(note.read_text().replace('"boot": "', '"boot": "another'))
        if lost:
            shard = notes[3].with_suffix("")
            content = shard.read_bytes()
            shard.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
        proxy.plan, before = fault_at("viola-test", "404", times=0), len(proxy.media)
        _download(mix, proxy.endpoint, out)
        assert len(proxy.media) - before == 2 + lost  # the two of the test split, and the one that was lost
    one, two = _content(out), _content(whole)
    assert one.pop("oxe-mix.lock.json") != two.pop("oxe-mix.lock.json")  # it names the source
    assert one == two
