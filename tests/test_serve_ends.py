"""When a policy server cannot answer: a model that fails, hangs or computes no numbers, and being stopped."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import socket as sockets
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch

from oxe_mix.errors import UserError
from tests.serving import (
    FRAME,
    REQUEST,
    HeldPolicy,
    Setting,
    ask,
    decoded,
    http,
    served,
    tiny_policy,
    until,
    write_checkpoint,
)
from train_llava.acting import json_numpy, server, turns
from train_llava.acting.incoming import Caps
from train_llava.acting.load import Loading
from train_llava.acting.msgpack_numpy import pack
from train_llava.acting.policy import Answer, Policy, Question
from train_llava.acting.serve_command import ServeOptions, run_serve
from train_llava.loading import load_checkpoint, save_checkpoint

FAILED = "server: could not answer; its log says why"
BODY = json.dumps(
    {"image": json.loads(json_numpy.dumps(FRAME)), "prompt": "go", "unnorm_key": "viola"}
).encode()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Policy:
    return tiny_policy(checkpoint)


def test_nothing_is_sent_of_a_model_that_computes_no_numbers(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = write_checkpoint(tmp_path / "broken")
    model, processor = load_checkpoint(broken)
    with torch.no_grad():
        model.model.language_model.norm.weight[3] = torch.nan
    save_checkpoint(broken, model, processor)
    with served(broken, tiny_policy(broken)) as running, running.connect() as socket:
        socket.recv()
        assert ask(socket, REQUEST) == FAILED
        assert http(running.port, "/act", BODY)[0] == 500
        assert http(running.port, "/healthz")[0] == 503
        assert running.server.tally.answered == {}
    assert "the model computes no numbers (nan)" in caplog.text


class Failing(HeldPolicy):
    """Fails at every batch, and notes whether what that took is still held when it is asked again."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.taken: list[weakref.ref[np.ndarray[tuple[int], np.dtype[np.float64]]]] = []
        self.is_held: list[bool] = []

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        gc.collect()
        self.is_held += [one() is not None for one in self.taken]
        self.batches.append([question.text for question in questions])
        assert self.go.wait(30)
        if len(questions) == 1:
            return self._policy.answer(questions)
        much = np.ones(10)
        self.taken.append(weakref.ref(much))
        raise MemoryError(much.size)


def test_a_batch_that_took_too_much_memory_is_let_go_before_each_is_asked_alone(
    checkpoint: Path, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, turns.__name__)  # pytest keeps what is logged, with all it holds
    failing = Failing(policy)
    with served(checkpoint, failing, Setting(max_batch=2)) as running, ExitStack() as opened:
        robots = [opened.enter_context(running.connect()) for _ in range(3)]
        for robot in robots:
            robot.recv()
        robots[0].send(pack(REQUEST))
        failing.until_asked()
        for robot in robots[1:]:
            robot.send(pack(REQUEST))
        running.until_in_flight(3)
        failing.go.set()
        for robot in robots:
            assert "actions" in decoded(robot.recv())
    assert [len(batch) for batch in failing.batches] == [1, 2, 1, 1]
    assert failing.is_held == [False, False]


def test_a_model_that_hangs_is_told_by_healthz(
    checkpoint: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldPolicy(policy)
    with served(checkpoint, held) as running, running.connect() as socket:
        socket.recv()
        socket.send(pack(REQUEST))
        held.until_asked()
        assert http(running.port, "/healthz")[0] == 200
        monkeypatch.setattr(turns, "_HANGS_S", 0.0)
        status, said, _ = http(running.port, "/healthz")
        assert (status, said["status"]) == (503, "the model is at one request for 0 s")
        held.go.set()
        assert "actions" in decoded(socket.recv())
        assert http(running.port, "/healthz")[0] == 200


def test_a_model_that_hangs_is_not_waited_for_at_the_end(
    checkpoint: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_STOP_S", 0.3)
    held = HeldPolicy(policy)
    with served(checkpoint, held) as running, running.connect() as socket:
        socket.recv()
        socket.send(pack(REQUEST))
        held.until_asked()
        stopping = asyncio.run_coroutine_threadsafe(running.server.stop(), running.loop)
        assert stopping.result(30) is False
        held.go.set()


_HANGS = """
import sys, threading
from pathlib import Path
from train_llava.acting import policy, serve_command, server
server._STOP_S = 0.3
policy.Policy.answer = lambda *_: threading.Event().wait()
options = serve_command.ServeOptions(Path(sys.argv[1]), port=0)
sys.exit(serve_command.run_serve(options))
"""


def test_the_command_ends_though_its_model_hangs(checkpoint: Path) -> None:
    command = [sys.executable, "-c", _HANGS, str(checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while "listening" not in said:
            said = process.stdout.readline()
            assert said
        port = int(said.split("127.0.0.1:")[1].split()[0])
        with sockets.create_connection(("127.0.0.1", port)) as asking:
            head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
            asking.sendall(head + BODY)
            until(lambda: "oxe_mix_in_flight 1" in http(port, "/metrics")[1])
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "0 requests answered" in out
    assert err == "error: the model hangs; ended without its answer\n"


def test_a_body_that_does_not_come_is_not_waited_for(
    checkpoint: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_BODY_S", 0.3)
    with served(checkpoint, policy) as running:
        with sockets.create_connection(("127.0.0.1", running.port), timeout=30) as slow:
            slow.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"request: did not come within 0 s" in answer


def test_who_asks_over_http_keeps_no_connection_of_the_robots(checkpoint: Path, policy: Policy) -> None:
    with served(checkpoint, policy, Setting(caps=Caps(connections=4))) as running, ExitStack() as opened:
        clients = [HTTPConnection("127.0.0.1", running.port, timeout=30) for _ in range(20)]
        is_closed = []
        for client in clients:
            opened.callback(client.close)
            client.request("POST", "/act", BODY)
            answer = client.getresponse()
            assert answer.status == 200
            answer.read()
            is_closed.append(answer.will_close)
        assert is_closed == [False] * 16 + [True] * 4
        robots = [opened.enter_context(running.connect()) for _ in range(4)]
        for robot in robots:
            robot.recv()
            assert "actions" in ask(robot, REQUEST)


_TWICE = """
import asyncio, os, signal, time
from train_llava.acting.serve_command import _asked_to_stop

async def main():
    asked = _asked_to_stop()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    await asked
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_two_signals_at_once_are_two() -> None:
    done = subprocess.run([sys.executable, "-c", _TWICE], capture_output=True, check=False, timeout=60)
    assert done.returncode in (-signal.SIGINT, -signal.SIGTERM)
    assert done.stderr == b""


@pytest.mark.parametrize("host", ["robot..local", "a" * 70])
def test_what_cannot_be_a_host_is_told_in_one_line(checkpoint: Path, host: str) -> None:
    options = ServeOptions(checkpoint, host=host, port=0, token="0123456789abcdef", loading=Loading("cpu"))
    with pytest.raises(UserError, match=f"^--host {host}: .*label"):
        run_serve(options)
