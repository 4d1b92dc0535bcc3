"""Whom a policy server answers: tokens, pages in a browser, sizes, numbers; and how it ends."""

from __future__ import annotations

import hmac
import json
import socket as sockets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus

from oxe_mix.errors import UserError
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
    until,
    write_checkpoint,
)
from train_llava.acting import gate as gates
from train_llava.acting import json_numpy
from train_llava.acting.gate import Gate
from train_llava.acting.incoming import Caps
from train_llava.acting.msgpack_numpy import pack
from train_llava.acting.policy import Policy

TOKEN = "0123456789abcdef"
PAGE = "https://robot.example"
BODY = json.dumps(
    {"image": json.loads(json_numpy.dumps(FRAME)), "instruction": "go", "unnorm_key": "viola"}
).encode()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Policy:
    return tiny_policy(checkpoint)


@pytest.fixture(scope="module")
def guarded(checkpoint: Path, policy: Policy) -> Iterator[Served]:
    with served(checkpoint, policy, Setting(gate=Gate(TOKEN, (PAGE,)))) as running:
        yield running


@pytest.fixture(scope="module")
def open_to_all(checkpoint: Path, policy: Policy) -> Iterator[Served]:
    with served(checkpoint, policy) as running:
        yield running


def _status(server: Served, **headers: str) -> int:
    with pytest.raises(InvalidStatus) as caught, server.connect(**headers):
        pass
    return caught.value.response.status_code


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}", f"Api-Key {TOKEN}", f"bearer  {TOKEN} "])
def test_who_knows_the_token_is_answered(guarded: Served, given: str) -> None:
    with guarded.connect(Authorization=given) as socket:
        socket.recv()
        assert "actions" in ask(socket, REQUEST)
    assert http(guarded.port, "/act", BODY, Authorization=given)[0] == 200
    assert http(guarded.port, "/metrics", Authorization=given)[0] == 200


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, f"Basic {TOKEN}"],
)
def test_who_does_not_is_refused(guarded: Served, given: str) -> None:
    headers = {"Authorization": given} if given else {}
    assert _status(guarded, **headers) == 401
    for path, body in (("/act", BODY), ("/metrics", None)):
        status, content, answered = http(guarded.port, path, body, **headers)
        assert (status, content) == (
            401,
            {"error": "Authorization: give the server's token as `Bearer TOKEN`"},
        )
        assert answered["WWW-Authenticate"] == "Bearer"
    # A probe needs none: it learns nothing but that the server is up.
    assert http(guarded.port, "/healthz")[0] == 200


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    Gate(TOKEN).check_token({"Authorization": f"Bearer {TOKEN}"})
    assert compared == [(TOKEN.encode(), TOKEN.encode())]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:8000", PAGE + ".evil.example"]
)
def test_pages_in_a_browser_are_refused(guarded: Served, open_to_all: Served, origin: str) -> None:
    for server, own in ((guarded, {"Authorization": f"Bearer {TOKEN}"}), (open_to_all, {})):
        assert _status(server, Origin=origin, **own) == 403
        status, content, _ = http(server.port, "/act", BODY, Origin=origin, **own)
        assert status == 403
        assert content["error"] == "Origin: pages in a browser may not ask; see --allow-origin"


def test_a_page_that_was_allowed_is_not(guarded: Served) -> None:
    with guarded.connect(Origin=PAGE, Authorization=f"Bearer {TOKEN}") as socket:
        socket.recv()
        assert "actions" in ask(socket, REQUEST)
    assert _status(guarded, Origin=PAGE) == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "robot.example", ""])
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(UserError, match="others can reach it; give a --token"):
        Gate().check_host(host)
    Gate(TOKEN).check_host(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_none(host: str) -> None:
    Gate().check_host(host)


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "ü" * 20])
def test_a_token_that_can_be_guessed_or_not_be_sent_is_refused(token: str) -> None:
    with pytest.raises(UserError, match="--token: is shorter than 16 plain characters"):
        Gate(token).check_host("127.0.0.1")


def test_what_is_too_large_is_refused(checkpoint: Path, policy: Policy) -> None:
    caps = Caps(message_bytes=200_000, image_pixels=60_000, text_length=20)
    with served(checkpoint, policy, Setting(caps=caps)) as running:
        with running.connect() as socket:
            socket.recv()
            assert ask(socket, REQUEST) == "image: has 65,536 pixels; at most 60,000"
            small = REQUEST | {"image": FRAME[:100]}
            assert ask(socket, small | {"prompt": "x" * 21}) == "prompt: has 21 characters; at most 20"
            assert "actions" in ask(socket, small | {"prompt": "x" * 20})
            socket.send(b"\0" * 200_001)
            with pytest.raises(ConnectionClosedError, match="1009"):
                socket.recv()
        status, content, _ = http(running.port, "/act", b" " * 200_001)
        assert (status, content) == (413, {"error": "request: is larger than 200,000 bytes"})
        assert running.server.tally.errors == {"too_large": 4}


def test_a_compressed_body_is_not_unpacked(open_to_all: Served) -> None:
    import gzip

    body = gzip.compress(BODY)
    assert http(open_to_all.port, "/act", body, **{"Content-Encoding": "gzip"})[0] == 400


def test_no_more_robots_than_the_most(checkpoint: Path, policy: Policy) -> None:
    with served(checkpoint, policy, Setting(caps=Caps(connections=2))) as running:
        with running.connect() as one, running.connect() as two:
            one.recv()
            two.recv()
            assert _status(running) == 503
            assert "oxe_mix_connections 2" in http(running.port, "/metrics")[1]
            assert "actions" in ask(one, REQUEST)
        with running.connect() as three:
            three.recv()
            assert "actions" in ask(three, REQUEST)


def test_no_more_connections_than_that_and_some(checkpoint: Path, policy: Policy) -> None:
    with served(checkpoint, policy, Setting(caps=Caps(connections=1))) as running:
        idle = [sockets.create_connection(("127.0.0.1", running.port)) for _ in range(17)]
        with sockets.create_connection(("127.0.0.1", running.port)) as another:
            assert another.recv(100).startswith(b"HTTP/1.1 503 ")
        with pytest.raises(InvalidStatus, match="503"):
            running.connect()
        for one in idle:
            one.close()
        until(lambda: http(running.port, "/healthz")[0] == 200)


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/", "/none"])
def test_who_only_looks_or_may_not_keeps_no_connection(guarded: Served, path: str) -> None:
    one = HTTPConnection("127.0.0.1", guarded.port)  # it would keep its connection
    one.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"} if path == "/metrics" else {})
    answer = one.getresponse()
    answer.read()
    assert answer.will_close


def test_who_connects_and_says_nothing_is_hung_up_on(
    checkpoint: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "_FIRST_REQUEST_S", 2.0)
    with served(checkpoint, policy) as running:
        with sockets.create_connection(("127.0.0.1", running.port), timeout=30) as silent:
            silent.sendall(b"GET /healthz HTTP/1.1\r\nHos")
            assert silent.recv(100) == b""
        with running.connect() as socket:
            socket.recv()
            time.sleep(2.2)
            assert "actions" in ask(socket, REQUEST)


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9\r\n\r\n", b"\r\n" * 10 + b"\0\r\n\r\n"]
)
def test_what_is_no_http_gets_no_traceback(
    open_to_all: Served, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with sockets.create_connection(("127.0.0.1", open_to_all.port), timeout=30) as raw:
        raw.sendall(sent)
        raw.shutdown(sockets.SHUT_WR)
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert not answer or answer.startswith(b"HTTP/1.1 4") or answer.startswith(b"HTTP/1.0 4")
    assert b"Traceback" not in answer
    assert "Traceback" not in caplog.text
    assert http(open_to_all.port, "/healthz")[0] == 200


def test_a_server_that_stops_answers_what_has_come(checkpoint: Path, policy: Policy) -> None:
    held = HeldPolicy(policy)
    with served(checkpoint, held) as running, ExitStack() as opened:
        *busy, idle = (opened.enter_context(running.connect()) for _ in range(4))
        over_http: list[int] = []
        poster = threading.Thread(target=lambda: over_http.append(http(running.port, "/act", BODY)[0]))
        for one in (*busy, idle):
            one.recv()
        for one in busy:
            one.send(pack(REQUEST))
        poster.start()
        running.until_in_flight(4)
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        with pytest.raises(ConnectionClosedOK, match=r"1001.*the server stops"):
            idle.recv()
        held.go.set()
        for one in busy:
            assert "actions" in decoded(one.recv())
            with pytest.raises(ConnectionClosedOK, match="1001"):
                one.recv()
        stopping.join()
        poster.join()
        assert over_http == [200]
        with pytest.raises(OSError, match="refused"):
            opened.enter_context(running.connect())
        assert running.server.tally.answered == {"websocket": 3, "http": 1}
