"""Policy servers for the tests: a checkpoint of random weights, a server in a thread, the real command."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from websockets.sync.client import ClientConnection, connect

from convert.action_codec import ActionCodec, write_codec
from convert.prompt import Asking, CameraRole, question
from convert.statistics import action_stats
from oxe_mix.cards import SHIPPED
from tests.conftest import OXE_MIX
from train_llava.acting.gate import Gate
from train_llava.acting.handshake import metadata
from train_llava.acting.incoming import Caps
from train_llava.acting.limits import Limits
from train_llava.acting.load import Loading, load_policy
from train_llava.acting.msgpack_numpy import pack
from train_llava.acting.obs_keys import obs_keys
from train_llava.acting.observation import Observation
from train_llava.acting.policy import Answer, Policy, Question
from train_llava.acting.server import PolicyServer
from train_llava.acting.service import Terms
from train_llava.acting.validator import ActionValidator
from train_llava.action_tokens import add_action_tokens, rows_of
from train_llava.config import TinyModel
from train_llava.loading import save_checkpoint
from train_llava.tiny import build_tiny

FRAME = np.random.default_rng(5).integers(0, 256, (256, 256, 3), np.uint8)
REQUEST = {"image": FRAME, "prompt": "pick up the red block", "unnorm_key": "viola"}
READY = "stops it"


def write_checkpoint(
    folder: Path,
    *,
    chunk: int = 1,
    cameras: tuple[CameraRole, ...] = ("primary",),
    state: bool = False,
    robots: tuple[str, ...] = ("bridge_orig", "viola"),
    hidden: int = 32,
) -> Path:
    """A tiny checkpoint that was never trained, with its robots' cards."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    asked = [question(f"pick up the {color} block") for color in ("red", "green", "blue")]
    model, processor = build_tiny(TinyModel(hidden_size=hidden, text_layers=2, heads=2), asked)
    add_action_tokens(model, processor.tokenizer)
    # New tokens begin alike, and an untrained model would give one answer to everything.
    torch.nn.init.normal_(rows_of(model.get_input_embeddings()))
    torch.nn.init.normal_(rows_of(model.get_output_embeddings()))
    save_checkpoint(folder, model, processor)
    rng = np.random.default_rng(0)
    stats = {
        name: action_stats(rng.normal(size=(50, 7)).astype(np.float32), (True,) * 6 + (False,), 1)
        for name in robots
    }
    states = {
        name: action_stats(rng.normal(size=(50, 8)).astype(np.float32), (True,) * 8, 1) for name in robots
    }
    asking = Asking(cameras=cameras, state=state)
    write_codec(
        folder,
        ActionCodec(action_dim=7, chunk=chunk, asking=asking, datasets=stats, states=states if state else {}),
    )
    (folder / "cards").mkdir()
    for name in robots:
        shutil.copy(SHIPPED / f"{name}.yaml", folder / "cards")
    return folder


class HeldPolicy:
    """A policy whose model answers once it is let go, and that says what it was asked together."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.go = threading.Event()
        self.batches: list[list[str]] = []
        self.codec, self.cameras, self.image_size = policy.codec, policy.cameras, policy.image_size
        self.is_parallel = policy.is_parallel

    def question(self, observation: Observation) -> Question:
        return self._policy.question(observation)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self.batches.append([question.text for question in questions])
        assert self.go.wait(30)
        if any("break the model" in question.text for question in questions):
            raise RuntimeError("secret of the server")
        return self._policy.answer(questions)

    def until_asked(self) -> None:
        """Wait until the model has something in hand."""
        until(lambda: bool(self.batches))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@dataclass
class Served:
    """A server in a thread of this process."""

    port: int
    server: PolicyServer
    loop: asyncio.AbstractEventLoop

    def connect(self, **headers: str) -> ClientConnection:
        """A websocket whose first message is still to be read."""
        return connect(
            f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, additional_headers=headers
        )

    def until_in_flight(self, number: int) -> None:
        """Wait until so many requests wait for the model."""
        until(lambda: self.server.tally.in_flight == number)

    def stop(self) -> None:
        """As a signal would."""
        asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop).result(30)


@dataclass(frozen=True)
class Setting:
    """What differs from one server of the tests to the next."""

    gate: Gate = field(default_factory=Gate)
    caps: Caps = field(default_factory=Caps)
    max_batch: int = 1
    limits: Limits = field(default_factory=Limits)
    rejects: bool = False
    obs_keys: Path | None = None


@contextmanager
def served(checkpoint: Path, policy: Policy | HeldPolicy, setting: Setting | None = None) -> Iterator[Served]:
    """Serve a policy on a free port; stopped at the end, unless it was before."""
    setting = setting or Setting()
    own = cast(Policy, policy)
    keys = obs_keys(own.codec.asking, setting.obs_keys)
    terms = Terms(setting.gate, keys, setting.caps, setting.max_batch)
    validator = ActionValidator(own.codec, setting.limits, action="reject" if setting.rejects else "clamp")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listener = socket.create_server(("127.0.0.1", 0))

    async def start() -> PolicyServer:
        server = PolicyServer(own, validator, terms, metadata(checkpoint, own, keys))
        await server.start(listener)
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    running = Served(listener.getsockname()[1], server, loop)
    try:
        yield running
    finally:
        running.stop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def tiny_policy(checkpoint: Path) -> Policy:
    """The checkpoint, loaded."""
    return load_policy(checkpoint, Loading(device="cpu"))


def ask(socket: ClientConnection, request: Any) -> Any:
    """Send a request packed by us, or bytes or text as they are; returns the reply decoded by msgpack."""
    socket.send(request if isinstance(request, bytes | str) else pack(request))
    return decoded(socket.recv(timeout=30))


def decoded(message: str | bytes) -> Any:
    """A reply: text as it is, arrays as NumPy arrays, by no code of the server's."""
    import msgpack

    if isinstance(message, str):
        return message

    def array(found: dict[Any, Any]) -> Any:
        if b"__ndarray__" not in found:
            return found
        flat: NDArray[Any] = np.frombuffer(found[b"data"], found[b"dtype"])
        return flat.reshape(found[b"shape"])

    return msgpack.unpackb(message, object_hook=array)


def http(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Ask over HTTP; returns status, the JSON or text, and headers. Errors are statuses, too."""
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, _content(answer), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, _content(error), dict(error.headers)


def _content(answer: Any) -> Any:
    text = answer.read().decode()
    return json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text


@dataclass
class Command:
    """`oxe-mix serve` as a user starts it."""

    process: subprocess.Popen[str]
    port: int
    said: list[str] = field(default_factory=list)

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; returns exit code and everything that was said on both streams."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=40)
        return self.process.returncode, "\n".join(self.said) + "\n" + out


@contextmanager
def command(checkpoint: Path, *words: str) -> Iterator[Command]:
    """Start the command on a free port, and wait until it listens."""
    process = subprocess.Popen(
        [OXE_MIX, "serve", "--checkpoint", str(checkpoint), "--port", "0", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # more threads only wait for each other at a tiny model
    )
    try:
        said = _until_ready(cast(IO[str], process.stdout))
        found = re.search(r"ws://[^ ]*:(\d+)", "\n".join(said))
        assert found, said
        yield Command(process, int(found[1]), said)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _until_ready(stream: IO[str]) -> list[str]:
    said = []
    for line in stream:
        said.append(line.rstrip())
        if READY in line:
            return said
    raise AssertionError("\n".join(said))
