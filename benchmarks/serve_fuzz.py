"""Broken messages against a policy server: none may end it, hang it, or make it grow.

python -m benchmarks.serve_fuzz [--number 20000] [--seed 0]

Each message is a request that was changed: bytes flipped, cut, repeated or put in, a field's value swapped,
headers that lie about sizes; some are whole. It goes over a websocket or as `POST /act` to `oxe-mix serve`
with a tiny checkpoint, in a process of its own. Every reply must be one that the protocol has.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection, connect

from benchmarks.results import write_result
from oxe_mix.text import say
from tests.serving import command, decoded, http, write_checkpoint

_ANSWER_S = 30.0
_LOOKS = 40  # at the server's memory
_CHUNK = (1, 7)
_PACKAGES = ("aiohttp", "msgpack", "numpy", "torch", "websockets")
_CLOSED = (1002, 1007, 1008, 1009)  # what a server may close with: protocol, text, policy, size
# Values that stand where others belong.
_ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**63,
    1.5,
    float("nan"),
    "",
    "x" * 3000,
    "\ud800",  # half of a surrogate pair, which JSON can say and UTF-8 cannot
    b"",
    b"\xff" * 9,
    [],
    {},
    [[]] * 9,
)
_DTYPES = ("|O", "|V8", "<c16", "<U9", ">i4", "|u1", "<f4", "<f8", "x", "", 3, None)
_BOMBS = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\x91",
    b"\x81",
)


@dataclass
class Found:
    """What came of a storm. replies: actions, error or closed; malformed: messages whose replies the protocol
    does not have; internal: the server's own errors; rss_mb: of the server, at even distances.
    """

    replies: Counter[str] = field(default_factory=Counter)
    malformed: list[str] = field(default_factory=list)
    internal: int = 0
    rss_mb: list[float] = field(default_factory=list)


def main() -> None:
    """Start a server, storm it, and write what was found."""
    parser = argparse.ArgumentParser(description="Broken messages against a policy server.")
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = write_checkpoint(Path(scratch) / "tiny", robots=("viola",))
        with command(checkpoint) as server:
            found = storm(server.port, server.process.pid, args.number, args.seed)
            alive = http(server.port, "/healthz")[0] == 200
    quarter = len(found.rss_mb) // 4
    first, last = float(np.mean(found.rss_mb[:quarter])), float(np.mean(found.rss_mb[-quarter:]))
    figures = {
        "messages": args.number,
        "seed": args.seed,
        "replies": dict(found.replies),
        "malformed": found.malformed[:20],
        "internal_errors": found.internal,
        "alive_after": alive,
        "rss_mb_first_quarter": round(first, 1),
        "rss_mb_last_quarter": round(last, 1),
    }
    say(json.dumps(figures, indent=1))
    say(f"result: {write_result('serve-fuzz', _PACKAGES, figures)}")
    if found.malformed or found.internal or not alive:
        raise SystemExit(1)


def storm(port: int, pid: int, number: int, seed: int) -> Found:
    """Send `number` messages one after the other, and look at each reply and now and then at the memory.

    Raises: TimeoutError when a reply does not come.
    """
    found, rng = Found(), random.Random(seed)
    connection: ClientConnection | None = None
    for i in range(number):
        if i % max(1, number // _LOOKS) == 0:
            found.rss_mb.append(_rss_mb(pid))
        if rng.random() < 0.3:
            body = _body(rng)
            _judge(found, body, *_over_http(port, body))
            continue
        message = _message(rng)
        connection = connection or _opened(port)
        try:
            connection.send(message)
            _judge(found, message, *_over_websocket(connection.recv(timeout=_ANSWER_S)))
        except ConnectionClosedError as error:
            code = error.rcvd.code if error.rcvd else 0
            _judge(found, message, "closed" if code in _CLOSED else "malformed", f"closed with {code}")
            connection = None
    if connection is not None:
        connection.close()
    metrics = http(port, "/metrics")[1]
    found.internal = int(metrics.split('errors_total{kind="internal"} ')[1].split()[0])
    return found


def _opened(port: int) -> ClientConnection:
    # legacy: outside of a `with` block, since one that is closed on us is opened anew.
    connection = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, legacy=True)
    connection.recv(timeout=_ANSWER_S)
    return connection


def _judge(found: Found, sent: bytes | str, reply: str, about: str) -> None:
    if reply == "malformed":
        found.malformed.append(f"{sent[:60]!r}: {about[:200]}")
    found.replies[reply] += 1


def _over_websocket(reply: str | bytes) -> tuple[str, str]:
    """Which of the protocol's replies it is."""
    if isinstance(reply, str):
        return _error(reply)
    with suppress(ValueError, KeyError, TypeError):
        answer = decoded(reply)
        actions = answer["actions"]
        whole = actions.shape == _CHUNK and actions.dtype == np.float32 and np.isfinite(actions).all()
        if whole and set(answer) == {"actions", "server_timing", "clamped"}:
            return "actions", ""
    return "malformed", repr(reply[:100])


def _over_http(port: int, body: bytes) -> tuple[str, str]:
    status, content, _ = http(port, "/act", body)
    with suppress(ValueError, KeyError, TypeError):
        if status in (400, 413, 422):
            return _error(content["error"])
        answer = json.loads(content) if isinstance(content, str) else content
        if status == 200 and answer["dtype"] == "<f4" and answer["shape"] == [7]:
            return "actions", ""
    return "malformed", f"{status} {content!r}"


def _error(text: str) -> tuple[str, str]:
    """One line that names a field, and is no traceback."""
    is_one = ": " in text and "\n" not in text and "Traceback" not in text and len(text) < 4000
    return ("error" if is_one else "malformed"), text


def _request(rng: random.Random) -> dict[str, Any]:
    """A request that will do."""
    side = rng.choice((1, 8, 32, 64))
    frame = np.frombuffer(rng.randbytes(side * side * 3), np.uint8).reshape(side, side, 3)
    name = rng.choice(("image", "observation/image"))
    return {name: frame, "prompt": f"pick up block {rng.randrange(100)}", "unnorm_key": "viola", "seed": 3}


def _array(frame: Any) -> Any:
    assert isinstance(frame, np.ndarray)
    return {b"__ndarray__": True, b"data": frame.tobytes(), b"dtype": frame.dtype.str, b"shape": frame.shape}


def _message(rng: random.Random) -> bytes | str:
    request = _request(rng)
    way = rng.choice(("whole", "fields", "array", "bytes", "lies"))
    if way == "fields":
        _swap(rng, request)
    packed = {name: _array(own) if isinstance(own, np.ndarray) else own for name, own in request.items()}
    if way == "array":
        for value in packed.values():
            if isinstance(value, dict) and b"dtype" in value:
                _swap_array(rng, value)
    try:
        message: bytes = msgpack.packb(packed)
    except (OverflowError, ValueError):
        return rng.choice(("", "text", "{}"))
    if way == "bytes":
        return _broken(rng, message)
    if way == "lies":
        return b"\x81\xa5image" + b"".join(rng.choice(_BOMBS) for _ in range(rng.randrange(1, 2000)))
    return message


def _body(rng: random.Random) -> bytes:
    request = _request(rng)
    if rng.random() < 0.5:
        _swap(rng, request)
    plain = {name: _json_array(own) if isinstance(own, np.ndarray) else own for name, own in request.items()}
    text = json.dumps(plain, default=repr)
    if rng.random() < 0.3:
        text = json.dumps({"encoded": text})
    if rng.random() < 0.3:
        return _broken(rng, text.encode())
    return b"[" * rng.randrange(9000) if rng.random() < 0.05 else text.encode()


def _json_array(frame: Any) -> dict[str, Any]:
    data = base64.b64encode(frame.tobytes()).decode()
    return {"__numpy__": data, "dtype": frame.dtype.str, "shape": frame.shape}


def _swap(rng: random.Random, request: dict[str, Any]) -> None:
    """Another value, another name, one more or one less."""
    name = rng.choice(list(request))
    match rng.randrange(4):
        case 0:
            request[name] = rng.choice(_ODD)
        case 1:
            request[rng.choice(("promt", "images", "a/b", "", "state", name * 9))] = request.pop(name)
        case 2:
            request[rng.choice(("state", "images", "instruction", "x"))] = rng.choice(_ODD)
        case _:
            del request[name]


def _swap_array(rng: random.Random, array: dict[bytes, Any]) -> None:
    sizes = [rng.choice((0, 1, 3, 64, -1, 2**31, 2**62, True, None)) for _ in range(rng.randrange(6))]
    match rng.randrange(4):
        case 0:
            array[b"dtype"] = rng.choice(_DTYPES)
        case 1:
            array[b"shape"] = sizes
        case 2:
            array[b"data"] = rng.choice(_ODD)
        case _:
            del array[rng.choice((b"data", b"dtype", b"shape"))]


def _broken(rng: random.Random, message: bytes) -> bytes:
    """Bytes flipped, cut off, repeated, or put in, at a few places of the head or anywhere."""
    own = bytearray(message)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(min(len(own), rng.choice((64, len(own)))) or 1)
        match rng.randrange(4):
            case 0:
                own[place : place + 1] = rng.randbytes(1)
            case 1:
                del own[place : place + rng.randrange(1, 40)]
            case 2:
                own[place:place] = own[place : place + 40]
            case _:
                own[place:place] = rng.randbytes(rng.randrange(1, 8))
    return bytes(own)


def _rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1e3


if __name__ == "__main__":
    main()
