"""Progress: a live bar for people, plain lines where nobody looks, JSON for machines; for many processes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from oxe_mix.errors import UserError
from oxe_mix.progress import Goal, Pace, Sample, progress
from tests.conftest import OXE_MIX
from tests.loopback import FaultProxy, fault_at, web_server
from tests.test_download import _mix

NUMBERS = re.compile(
    r"download: \d+ of 9 shards, [\d.]+ [kM]?B of about 3\.\d MB, [\d.]+ [kM]?B/s, \d+ s, about \d+ s left"
)


@pytest.fixture
def slow(bucket: Path) -> Iterator[str]:
    """A source that takes some five seconds for what is asked of it, and fails once."""
    with web_server(bucket) as endpoint, FaultProxy(endpoint, fault_at("00001-of-00005", "503", 1)) as proxy:
        proxy.bytes_per_s = 0.6e6
        yield proxy.endpoint


def _command(source: str, tmp_path: Path, *more: str) -> list[str]:
    mix = tmp_path / "two.yaml"
    mix.write_text("".join(_mix(tmp_path, viola=1.0, bridge=0.8).read_text().splitlines(keepends=True)[:-1]))
    place = ["--mix", str(mix), "--source", source, "--out", str(tmp_path / "data"), "--jobs", "2"]
    return [OXE_MIX, "download", *place, *more]


def test_where_nobody_looks_it_is_a_line_every_two_seconds(slow: str, tmp_path: Path) -> None:
    """Two worker processes: what they did is read off the target."""
    command = _command(slow, tmp_path, "--workers", "2")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("download: ") for line in lines)
    assert any(NUMBERS.match(line) for line in lines)
    assert any("retried" in line for line in lines)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr


def test_machines_get_json_only(slow: str, tmp_path: Path) -> None:
    command = _command(slow, tmp_path, "--workers", "1", "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plan, end = (json.loads(line) for line in done.stdout.splitlines())
    assert (plan["event"], end["event"]) == ("plan", "done")
    assert end["episodes"] == plan["total"]["episodes"] == end["asked_episodes"]
    assert end["fetched_bytes"] == sum(f.stat().st_size for f in (tmp_path / "data").rglob("*.tfrecord-*"))
    assert end["retries"] >= 2
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {event["event"] for event in events} == {"progress"}
    assert 0 < events[0]["num_bytes"] <= end["fetched_bytes"]
    assert events[0]["bytes_per_s"] > 0


def test_people_get_a_bar_that_leaves_no_trace(slow: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        _command(slow, tmp_path, "--workers", "1"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "140", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:
        pass  # the terminal is gone with the process
    finally:
        os.close(ours)
    out = process.communicate()[0].decode()
    text = shown.decode(errors="replace")
    assert process.returncode == 0, text
    assert "━" in text
    assert re.search(r"of 9 shards, [\d.]+ [kM]?B of about 3\.\d MB, [\d.]+ [kM]?B/s", text)
    assert "result:" in out


def test_a_look_that_fails_does_not_end_the_watch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("oxe_mix.progress.PLAIN_INTERVAL_S", 0.01)
    looks, enough = list[int](), threading.Event()

    def sample() -> Sample:
        looks.append(len(looks))
        if looks[-1] == 9:
            enough.set()
        if looks[-1] % 2:
            raise UserError("the bucket is busy")
        return Sample(looks[-1])

    with progress(Goal("download", "shard", 100), sample):
        assert enough.wait(60)
    said = re.findall(r"download: (\d+) of 100", capsys.readouterr().err)
    assert said[:9] == ["0", "0", "2", "2", "4", "4", "6", "6", "8"]


def test_the_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace(Goal("download", "shard", 10, num_bytes=1000))
    start = pace._start
    assert pace.after(Sample(0, 0), start)["seconds_left"] is None
    assert pace.after(Sample(1, 100), start + 2) == {"seconds": 2.0, "bytes_per_s": 50, "seconds_left": 18}
    # A burst long ago does not promise anything: eleven seconds later only what came since counts.
    assert pace.after(Sample(1, 110), start + 13)["bytes_per_s"] == 0
    assert pace.after(Sample(2, 130), start + 15)["bytes_per_s"] == 10


def test_work_without_bytes_is_paced_by_what_is_done() -> None:
    pace = Pace(Goal("convert", "shard", 10))
    pace.after(Sample(0), pace._start)
    assert pace.after(Sample(4), pace._start + 2) == {"seconds": 2.0, "bytes_per_s": None, "seconds_left": 3}
