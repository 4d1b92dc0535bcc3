"""Many who ask one model: in which turn, together or alone, and what becomes of those who do not wait."""

from __future__ import annotations

import json
import re
import socket as sockets
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError

from tests.serving import (
    FRAME,
    REQUEST,
    HeldPolicy,
    Served,
    Setting,
    ask,
    decoded,
    http,
    served,
    tiny_policy,
    write_checkpoint,
)
from train_llava.acting import json_numpy
from train_llava.acting.msgpack_numpy import pack
from train_llava.acting.observation import Observation
from train_llava.acting.policy import Policy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Policy:
    return tiny_policy(checkpoint)


def test_with_one_at_a_time_everyone_gets_the_same_share(checkpoint: Path, policy: Policy) -> None:
    served_to = dict.fromkeys("01234", 0)
    together = threading.Barrier(len(served_to), timeout=30)
    with served(checkpoint, policy) as running:

        def keep_asking(name: str) -> None:
            with running.connect() as socket:
                socket.recv()
                together.wait()
                while max(served_to.values()) < 20:
                    assert "actions" in ask(socket, REQUEST)
                    served_to[name] += 1

        with ThreadPoolExecutor(len(served_to)) as pool:
            deque(pool.map(keep_asking, served_to), maxlen=0)
    assert min(served_to.values()) >= 18


def test_what_waits_is_answered_together_as_it_is_alone(checkpoint: Path, policy: Policy) -> None:
    held = HeldPolicy(policy)
    prompts = [
        f"pick up the {word}" for word in ("red block", "green one", "a", "very large blue block there")
    ]

    def one(running: Served, prompt: str) -> Any:
        with running.connect() as socket:
            socket.recv()
            return ask(socket, REQUEST | {"prompt": prompt})["actions"]

    with served(checkpoint, held, Setting(max_batch=8)) as running, ThreadPoolExecutor(5) as pool:
        first = pool.submit(one, running, "go")
        held.until_asked()
        rest = [pool.submit(one, running, prompt) for prompt in prompts]
        running.until_in_flight(5)
        held.go.set()
        together = [future.result() for future in rest]
        first.result()
        batches = re.findall(
            r'oxe_mix_batch_size_bucket{le="(\d+)"} (\d+)', http(running.port, "/metrics")[1]
        )
    assert [len(batch) for batch in held.batches] == [1, 4]
    assert dict(batches)["1"] == "1"
    assert dict(batches)["4"] == "2"
    assert len({actions.tobytes() for actions in together}) >= 3
    for prompt, actions in zip(prompts, together, strict=True):
        alone = policy.answer([policy.question(Observation({"primary": FRAME}, prompt, "viola"))])[0].actions
        assert (actions == alone.astype(np.float32)).all()


def test_a_question_that_breaks_the_model_takes_no_other_with_it(
    checkpoint: Path, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    held = HeldPolicy(policy)

    def one(running: Served, prompt: str) -> Any:
        with running.connect() as socket:
            socket.recv()
            return ask(socket, REQUEST | {"prompt": prompt})

    with served(checkpoint, held, Setting(max_batch=8)) as running, ThreadPoolExecutor(3) as pool:
        first = pool.submit(one, running, "go")
        held.until_asked()
        broken, fine = pool.submit(one, running, "break the model"), pool.submit(one, running, "go on")
        running.until_in_flight(3)
        held.go.set()
        assert broken.result() == "server: could not answer; its log says why"
        assert "actions" in fine.result()
        assert "actions" in first.result()
        assert http(running.port, "/healthz")[0] == 200
        one(running, "break the model")
        assert http(running.port, "/healthz")[0] == 503
        one(running, "go on")
        assert http(running.port, "/healthz")[0] == 200
    assert "secret of the server" in caplog.text


def test_who_leaves_is_not_asked_for(checkpoint: Path, policy: Policy) -> None:
    held = HeldPolicy(policy)
    with served(checkpoint, held) as running, running.connect() as patient:
        patient.recv()
        patient.send(pack(REQUEST))
        held.until_asked()
        with running.connect() as hasty:
            hasty.recv()
            hasty.send(pack(REQUEST | {"prompt": "forget this"}))
            running.until_in_flight(2)
        running.until_in_flight(1)
        held.go.set()
        assert "actions" in decoded(patient.recv())
        assert "actions" in ask(patient, REQUEST)
    assert not any("forget" in text for batch in held.batches for text in batch)


def test_who_hangs_up_over_http_is_not_asked_for(checkpoint: Path, policy: Policy) -> None:
    held = HeldPolicy(policy)
    body = {"image": json.loads(json_numpy.dumps(FRAME)), "prompt": "forget this", "unnorm_key": "viola"}
    text = json.dumps(body).encode()
    head = f"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n".encode()
    with served(checkpoint, held) as running, running.connect() as patient:
        patient.recv()
        patient.send(pack(REQUEST))
        held.until_asked()
        for _ in range(5):
            with sockets.create_connection(("127.0.0.1", running.port)) as hasty:
                hasty.sendall(head + text)
                running.until_in_flight(2)
            running.until_in_flight(1)
        held.go.set()
        assert "actions" in decoded(patient.recv())
        assert "actions" in ask(patient, REQUEST)
    assert not any("forget" in text for batch in held.batches for text in batch)


def test_to_ask_on_and_on_without_waiting_ends_the_connection(checkpoint: Path, policy: Policy) -> None:
    held = HeldPolicy(policy)
    with served(checkpoint, held) as running:
        with running.connect() as socket:
            socket.recv()
            for _ in range(2):  # one too early is answered in its turn
                socket.send(pack(REQUEST))
            held.go.set()
            assert "actions" in decoded(socket.recv())
            assert "actions" in decoded(socket.recv())
            held.go.clear()
            for _ in range(3):
                socket.send(pack(REQUEST))
            with pytest.raises(ConnectionClosedError, match=r"1008.*wait for an answer"):
                deque(socket, maxlen=0)
            held.go.set()
        assert running.server.tally.errors == {"order": 1}
