"""What a policy server adds to its model, and many robots at once.

python -m benchmarks.serve_load [--asks 600] [--clients 64] [--seconds 60]

Overhead: one client on loopback asks about 256x256 frames. Of each round trip the time that the policy itself
took, from the observation to the actions, is taken off; what is left is the server's: the network, both
encodings, two hand-overs between threads, the validator, the counts. Load: many clients ask `oxe-mix serve`
as fast as they are answered; each one's share, and every reply an answer. Both with a tiny checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from websockets.sync.client import ClientConnection, connect

from benchmarks.results import write_result
from oxe_mix.text import say
from tests.serving import FRAME, command, decoded, served, tiny_policy, write_checkpoint
from train_llava.acting.msgpack_numpy import pack
from train_llava.acting.observation import Observation
from train_llava.acting.policy import Answer, Policy, Question

_PACKAGES = ("aiohttp", "msgpack", "numpy", "torch", "websockets")
_WARM_UP = 20
_PROMPT = "pick up the red block"
_MESSAGE = pack({"image": FRAME, "prompt": _PROMPT, "unnorm_key": "viola"})


def main() -> None:
    """Measure both, and write what was found."""
    parser = argparse.ArgumentParser(description="What a policy server adds, and many robots at once.")
    parser.add_argument("--asks", type=int, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = write_checkpoint(Path(scratch) / "tiny", robots=("viola",))
        found: dict[str, Any] = {"load_average_before": round(os.getloadavg()[0], 2)}  # others' work
        found["overhead"] = _overhead(checkpoint, args.asks)
        with command(checkpoint, "--max-connections", str(args.clients)) as server:
            found["load"] = _load(server.port, args.clients, args.seconds)
    say(json.dumps(found, indent=1))
    say(f"result: {write_result('serve-load', _PACKAGES, found)}")


def _overhead(checkpoint: Path, asks: int) -> dict[str, Any]:
    """Milliseconds of the bare policy, of a round trip through the server, and of what is between, by ask."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=_serve_timed, args=(checkpoint, there))
    server.start()
    try:
        through = []
        with _opened(here.recv()) as connection:
            for _ in range(_WARM_UP + asks):
                start = time.perf_counter()
                _ask(connection)
                through.append((time.perf_counter() - start) * 1000)
        here.send("stop")
        bare = np.array(here.recv())[_WARM_UP:]
    finally:
        server.join(30)
        server.kill()
    all_of_it = np.array(through)[_WARM_UP:]
    return {
        "asks": asks,
        "bare_ms": _p50_p95(bare),
        "through_server_ms": _p50_p95(all_of_it),
        "overhead_ms": _p50_p95(all_of_it - bare),
    }


class _TimedPolicy:
    """A policy that notes how long it took for each ask, ms, while there is one client."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.codec, self.cameras, self.image_size = policy.codec, policy.cameras, policy.image_size
        self.is_parallel = policy.is_parallel
        self.took: list[float] = []

    def question(self, observation: Observation) -> Question:
        start = time.perf_counter()
        question = self._policy.question(observation)
        self.took.append((time.perf_counter() - start) * 1000)
        return question

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        start = time.perf_counter()
        answers = self._policy.answer(questions)
        self.took[-1] += (time.perf_counter() - start) * 1000
        return answers


def _serve_timed(checkpoint: Path, client: Any) -> None:
    """In a process of its own, until the client says so; then it is told the times."""
    torch.set_num_threads(1)  # as `command` has it
    policy = _TimedPolicy(tiny_policy(checkpoint))
    with served(checkpoint, cast(Policy, policy)) as running:
        client.send(running.port)
        client.recv()
    client.send(policy.took)


def _load(port: int, num_clients: int, seconds: float) -> dict[str, Any]:
    """What each of many clients got, in turns; all of them are connected before the first one asks."""
    served = [0] * num_clients
    wrong: list[str] = []
    ready = threading.Barrier(num_clients)
    took: list[list[float]] = [[] for _ in range(num_clients)]

    def keep_asking(i: int) -> None:
        try:
            with _opened(port) as connection:
                ready.wait(60)
                end = time.perf_counter() + seconds
                while (start := time.perf_counter()) < end:
                    _ask(connection)
                    took[i].append((time.perf_counter() - start) * 1000)
                    served[i] += 1
        except (OSError, ValueError, TimeoutError, AssertionError, threading.BrokenBarrierError) as error:
            wrong.append(f"client {i}: {error!r}")

    threads = [threading.Thread(target=keep_asking, args=(i,)) for i in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "clients": num_clients,
        "seconds": seconds,
        "answered": sum(served),
        "errors": wrong,
        "fewest": min(served),
        "most": max(served),
        "answers_per_s": round(sum(served) / seconds, 1),
        "round_trip_ms": _p50_p95(np.concatenate(took)),
    }


def _opened(port: int) -> ClientConnection:
    connection = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, legacy=True)
    connection.recv(timeout=30)
    return connection


def _ask(connection: ClientConnection) -> None:
    connection.send(_MESSAGE)
    answer = decoded(connection.recv(timeout=60))
    assert isinstance(answer, dict), answer
    assert answer["actions"].shape == (1, 7), answer


def _p50_p95(values: Any) -> dict[str, float]:
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2)}


if __name__ == "__main__":
    main()
