"""`oxe-mix serve` as a user starts and stops it, and under a short storm of broken messages."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedOK
from websockets.sync.client import connect

from benchmarks.serve_fuzz import storm
from convert.action_codec import CODEC_FILE
from oxe_mix.errors import UserError
from tests.conftest import OXE_MIX
from tests.serving import REQUEST, command, decoded, http, until, write_checkpoint
from train_llava.acting.msgpack_numpy import pack
from train_llava.acting.serve_command import ServeOptions, run_serve


def _counted(port: int, name: str) -> float:
    """A figure of /metrics, summed over its labels."""
    said = http(port, "/metrics")[1]
    return sum(float(value) for value in re.findall(rf"^oxe_mix_{name}(?:{{.*}})? (.*)$", said, re.MULTILINE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose answers take a while: of 84 tokens."""
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny", chunk=12)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_in_the_middle_of_a_request_it_answers_it_first(
    checkpoint: Path, number: int, code: int
) -> None:
    with command(checkpoint) as running, ExitStack() as opened:
        url = f"ws://127.0.0.1:{running.port}"
        robots = [opened.enter_context(connect(url, compression=None)) for _ in range(2)]
        for robot in robots:
            robot.recv()
            robot.send(pack(REQUEST))
        # Both questions have come; the model is at the first one, unless this process was slow.
        until(lambda: _counted(running.port, "in_flight") + _counted(running.port, "requests_total") >= 2)
        running.process.send_signal(number)
        for robot in robots:
            assert decoded(robot.recv(timeout=30))["actions"].shape == (12, 7)
            with pytest.raises(ConnectionClosedOK, match=r"1001.*the server stops"):
                robot.recv(timeout=30)
        out, _ = running.process.communicate(timeout=30)
    assert running.process.returncode == code
    stopping, summary = out.splitlines()
    assert stopping == f"{signal.Signals(number).name}: stopping"
    assert re.fullmatch(
        r"2 requests answered, 0 refused, 0 values clamped, p50 [\d.]+ ms, p95 [\d.]+ ms in the server",
        summary,
    )


def test_a_storm_of_broken_messages_breaks_nothing_and_a_taken_port_is_told(checkpoint: Path) -> None:
    small = write_checkpoint(checkpoint.parent / "small")
    with command(small) as running:
        port = f"{running.port}"
        taken = subprocess.run(
            [OXE_MIX, "serve", "--checkpoint", small, "--port", port],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (taken.returncode, taken.stdout) == (2, "")
        why = "cannot be had on 127.0.0.1 (Address already in use); choose another, or 0 for any"
        assert taken.stderr == f"error: --port {port}: {why}\n"
        found = storm(running.port, running.process.pid, number=400, seed=1)
        assert sum(found.replies.values()) == 400
        assert found.replies["error"] > 100
        assert found.replies["actions"] > 40
        assert found.malformed == []
        assert found.internal == 0
        code, said = running.end(signal.SIGTERM)
    assert code == 143
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"host": "0.0.0.0"},
            r"^--host 0\.0\.0\.0: others can reach it; give a --token that they must know$",
        ),
        ({"token": "short"}, r"^--token: is shorter than 16 plain characters"),
        ({"obs_keys": "cam: primry\n"}, r"file\.yaml:1: cam: 'primry' is unknown; did you mean primary\?$"),
        ({"limits": "cam: primry\n"}, r"file\.yaml: cam: "),
        ({"limits": "datasets: {vola: {low: null}}\n"}, r"datasets\.vola: unknown; did you mean viola\?$"),
        ({"host": "203.0.113.7", "token": "x" * 16}, r"^--port 0: cannot be had on 203\.0\.113\.7 "),
        ({"checkpoint": Path("nowhere")}, r"^nowhere: no such folder"),
    ],
)
def test_what_will_not_do_is_told_before_the_weights_are_read(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    shutil.copy(checkpoint / CODEC_FILE, tmp_path)  # and no weights: to load them would be another error
    file = tmp_path / "file.yaml"
    for name in {"obs_keys", "limits"} & set(change):
        file.write_text(change[name])
        change = change | {name: file}
    with pytest.raises(UserError, match=says) as caught:
        run_serve(dataclasses.replace(ServeOptions(tmp_path, port=0), **change))
    assert len(str(caught.value).splitlines()) == 1
