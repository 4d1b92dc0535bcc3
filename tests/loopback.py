"""On loopback for the tests: a proxy that injures answers, a web server; processes are in `tests.servers`."""

from __future__ import annotations

import functools
import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import urllib3

BUCKET = "openx"
_BLOCK = 1 << 16


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    """Wait until a server that was started answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        time.sleep(0.05)
    raise TimeoutError(f"{process.args!r} does not answer")


@contextmanager
def server_process(port: int, *command: str, env: dict[str, str] | None = None) -> Iterator[None]:
    """Run a server of this environment's Python, and end it by its own id."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )
    try:
        wait_for(port, process)
        yield
    finally:
        process.terminate()
        process.wait()


def upload(endpoint: str, folder: Path) -> None:
    """Put a folder tree into the emulator's bucket."""
    pool = urllib3.PoolManager(maxsize=8)

    def put(file: Path) -> None:
        name = quote(str(file.relative_to(folder)), safe="")
        url = f"{endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
        answer = pool.request("POST", url, body=file.read_bytes())
        assert answer.status == 200, answer.data

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(put, [file for file in folder.rglob("*") if file.is_file()]))
    pool.clear()


Plan = Callable[[str, int], str | None]  # (path, how often it was asked for before) to a fault or None


def seeded_faults(seed: int, kinds: tuple[str, ...], per_path: int = 2, rate: float = 0.5) -> Plan:
    """Faults that depend on the seed and the path alone, at most `per_path` in a row for each path."""

    def plan(path: str, before: int) -> str | None:
        rng = random.Random(f"{seed}/{path}/{before}")
        return rng.choice(kinds) if before < per_path and rng.random() < rate else None

    return plan


def fault_at(part: str, fault: str, times: int = 1 << 30) -> Plan:
    """One fault for every path that has `part` in it, the first `times` times it is asked for."""
    return lambda path, before: fault if part in path and before < times else None


@dataclass
class Request:
    """What the proxy was asked for."""

    method: str
    path: str
    headers: dict[str, str]
    fault: str | None = None


@dataclass
class FaultProxy:
    """An HTTP proxy before a server: records all, and injures downloads of media as its plan says."""

    upstream: str
    plan: Plan = field(default=lambda _path, _before: None)
    bytes_per_s: float | None = None
    requests: list[Request] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    guard: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""

    def __enter__(self) -> FaultProxy:
        handler = functools.partial(_Proxy, self)
        self._server = _Server(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def record(self, request: Request) -> Request:
        """Note a request and decide what happens to it."""
        with self.guard:
            if _is_media(request):
                request.fault = self.plan(urlsplit(request.path).path, self.asked[request.path])
                self.asked[request.path] += 1
            self.requests.append(request)
        return request

    @property
    def media(self) -> list[Request]:
        """The downloads of shards."""
        return [request for request in self.requests if _is_media(request)]


def _is_media(request: Request) -> bool:
    return request.method == "GET" and ".tfrecord-" in request.path


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no error here."""


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: FaultProxy, *args: Any) -> None:
        self.proxy = proxy
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def _forward(self) -> None:
        request = self.proxy.record(Request(self.command, self.path, dict(self.headers)))
        refusal = {"503": 503, "429": 429, "404": 404, "403": 403}.get(request.fault or "")
        if refusal:
            self.send_response(refusal)
            if refusal == 429:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = urlsplit(self.proxy.upstream)
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        try:
            connection.request(self.command, self.path, body=body or None, headers=headers)
            self._answer(connection.getresponse(), request.fault)
        finally:
            connection.close()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _forward  # noqa: N815

    def _answer(self, response: http.client.HTTPResponse, fault: str | None) -> None:
        self.send_response(response.status)
        length = response.headers.get("Content-Length")
        skipped = ("transfer-encoding", "connection", "server", "date")
        for name, value in response.getheaders():
            if name.lower() not in skipped:
                self.send_header(name, value)
        if length is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self._body(response, int(length or 0), fault)

    def _body(self, response: http.client.HTTPResponse, length: int, fault: str | None) -> None:
        middle, sent = length // 2, 0
        while block := response.read(
            min(_BLOCK, max(1, middle - sent)) if fault and sent < middle else _BLOCK
        ):
            if fault and sent >= middle:
                if self._hurt(fault, block):
                    return
                fault = None
                sent += len(block)
                continue
            self.wfile.write(block)
            sent += len(block)
            if self.proxy.bytes_per_s:
                time.sleep(len(block) / self.proxy.bytes_per_s)

    def _hurt(self, fault: str, block: bytes) -> bool:
        """Do what the plan wants in mid-body; True when that is the end of the answer."""
        self.wfile.flush()
        if fault == "wrong_bytes":
            self.wfile.write(bytes([block[0] ^ 0xFF]) + block[1:])
            return False
        self.close_connection = True
        if fault == "stall":
            self.proxy.stopping.wait(60)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        return True  # "truncated": less than was announced, and a clean end


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """A plain web server with ranges and entity tags, which lists no folders; yields its endpoint."""
    server = _Server(("127.0.0.1", 0), functools.partial(_Files, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(403 if path.is_dir() else 404)
            return
        content, status = path.read_bytes(), 200
        total = len(content)
        start, stop = 0, total
        if spec := self.headers.get("Range"):
            first, _, last = spec.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(total, int(last) + 1) if last else total, 206
        if start >= total and status == 206:
            self.send_error(416)
            return
        self.send_response(status)
        stat = path.stat()
        self.send_header("ETag", f'"{stat.st_mtime_ns:x}-{total:x}"')
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        self.end_headers()
        self.wfile.write(content[start:stop])
