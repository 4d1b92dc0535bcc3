"""The policy server: a websocket as openpi's, `POST /act` as OpenVLA's, `/healthz` and `/metrics`, on one
port.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from aiohttp import web

from oxe_mix.text import count
from train_llava.acting import json_numpy
from train_llava.acting.arrays import Kind, RequestError
from train_llava.acting.connection import Connection
from train_llava.acting.gate import Door
from train_llava.acting.msgpack_numpy import pack
from train_llava.acting.service import Service, Terms

if TYPE_CHECKING:
    from train_llava.acting.policy import Policy
    from train_llava.acting.validator import ActionValidator

_logger = logging.getLogger(__name__)
_STATUS: dict[Kind, int] = {
    "message": 400,
    "field": 400,
    "order": 400,
    "token": 401,
    "origin": 403,
    "too_large": 413,
    "rejected": 422,
    "internal": 500,
    "full": 503,
}
# aiohttp waits for the time to stop twice.
_PING_S, _BODY_S, _IDLE_S, _STOP_S, _CLOSE_S = 30.0, 30.0, 60.0, 12.0, 2.0
# Whoever is refused for these, or only looks, keeps no connection from a robot.
_STRANGERS: tuple[Kind, ...] = ("token", "origin", "message", "full")
# Connections beside those of robots, so that a full server still says how it is.
_SPARE = 16
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PolicyServer:
    """Answers on a socket until it is stopped; made inside a running event loop."""

    def __init__(
        self, policy: Policy, validator: ActionValidator, terms: Terms, about: dict[str, Any]
    ) -> None:
        """`about`: what each client is told first."""
        self._service = Service(policy, validator, terms)
        self.tally = self._service.tally
        self._about = pack(about)
        self._connections: set[Connection] = set()
        app = web.Application(middlewares=[self._guard], client_max_size=terms.caps.message_bytes)
        app.router.add_get("/", self._talk)
        app.router.add_post("/act", self._act)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/metrics", self._metrics)
        silent = logging.getLogger(f"{__name__}.aiohttp")
        silent.setLevel(logging.CRITICAL)  # it logs a traceback for every line that is no HTTP
        self._runner = web.AppRunner(
            app,
            handle_signals=False,
            access_log=None,
            logger=silent,
            keepalive_timeout=_IDLE_S,
            auto_decompress=False,  # a small body must not become a large one
            shutdown_timeout=_STOP_S,
            handler_cancellation=True,  # who gave up waiting must not keep the model from those who wait
        )

    async def start(self, listener: socket.socket) -> None:
        """Answer on a bound socket."""
        await self._runner.setup()
        assert self._runner.server is not None
        limit = self._service.terms.caps.connections + _SPARE
        self._door = Door(self._runner.server, limit, self._turned_away)
        self._listening = await asyncio.get_running_loop().create_server(self._door, sock=listener)

    async def stop(self) -> bool:
        """Take nothing new, answer what has come, tell the clients, and end; at most half a minute.

        Returns: whether the model came to an end with what it had.
        """
        self._listening.close()
        await asyncio.gather(*(connection.stop() for connection in self._connections))
        await self._runner.cleanup()
        is_done = not self._service.turns.is_busy
        await self._service.turns.close()
        return is_done

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Who asks is checked before anything is done; whatever goes wrong is JSON, and never a traceback."""
        gate = self._service.terms.gate
        try:
            self._door.has_asked(request)
            gate.check_origin(request.headers)
            if request.path != "/healthz":
                gate.check_token(request.headers)
            answer = await handler(request)
        except RequestError as error:
            answer = self._refusal(error.kind, _STATUS[error.kind], str(error))
        except web.HTTPRequestEntityTooLarge:
            largest = f"{self._service.terms.caps.message_bytes:,} bytes"
            answer = self._refusal("too_large", 413, f"request: is larger than {largest}")
        except web.HTTPException as error:
            answer = self._refusal("message", error.status, f"request: {error.reason.lower()}")
        except ConnectionError:
            raise  # the client is gone
        except Exception:
            _logger.exception("%s %s", request.method, request.path)
            answer = self._refusal("internal", 500, "server: could not answer; its log says why")
        return self._let_go(answer)

    def _let_go(self, answer: web.StreamResponse) -> web.StreamResponse:
        """Clients over HTTP may keep the connections that are spare, and none of the robots'."""
        assert self._runner.server is not None
        if len(self._runner.server.connections) - len(self._connections) > _SPARE:
            answer.force_close()
        return answer

    def _refusal(self, kind: Kind, status: int, problem: str) -> web.Response:
        self.tally.errors[kind] += 1
        headers = {"WWW-Authenticate": "Bearer"} if kind == "token" else None
        answer = web.json_response({"error": problem}, status=status, headers=headers)
        if kind in _STRANGERS:
            answer.force_close()
        return answer

    def _turned_away(self) -> None:
        self.tally.errors["full"] += 1

    async def _talk(self, request: web.Request) -> web.StreamResponse:
        """A robot's websocket, from its first message to its last."""
        caps = self._service.terms.caps
        # Compression would cost more than it saves on frames; pings find out who is gone without a word.
        answer = web.WebSocketResponse(
            compress=False, max_msg_size=caps.message_bytes, heartbeat=_PING_S, timeout=_CLOSE_S
        )
        if not answer.can_prepare(request).ok:
            raise RequestError("request", "here is a websocket; over HTTP there is POST /act", "message")
        if len(self._connections) >= caps.connections:
            raise RequestError("server", f"has {count(caps.connections, 'connection')}, its most", "full")
        connection = Connection(answer, self._service)
        self._connections.add(connection)
        self.tally.connections = len(self._connections)
        try:
            await answer.prepare(request)
            await answer.send_bytes(self._about)
            await connection.run()
        except ConnectionError:
            pass  # the client is gone
        finally:
            self._connections.discard(connection)
            self.tally.connections = len(self._connections)
        return answer

    async def _act(self, request: web.Request) -> web.Response:
        """One request over HTTP; there is no action before it that a jump could be measured from."""
        try:
            async with asyncio.timeout(_BODY_S):
                body = await request.read()
        except TimeoutError as error:
            raise RequestError("request", f"did not come within {_BODY_S:.0f} s", "message") from error
        since = time.perf_counter()
        message, is_encoded = json_numpy.loads(body)
        reply = await self._service.act(message, "http", {}, since)
        actions = reply.actions.astype(np.float32)
        text = json_numpy.dumps(actions if self._service.chunk > 1 else actions[0])
        timing = ", ".join(f"{phase};dur={ms:.3f}" for phase, ms in reply.timing_ms.items())
        return web.Response(
            text=json.dumps(text) if is_encoded else text,
            content_type="application/json",
            headers={"Server-Timing": timing, "X-Clamped": str(len(reply.clamped))},
        )

    async def _health(self, _: web.Request) -> web.Response:
        """Whether the model answers; nothing of it is secret."""
        problem = self._service.turns.problem()
        answer = web.json_response({"status": problem or "ok"}, status=503 if problem else 200)
        answer.force_close()
        return answer

    async def _metrics(self, _: web.Request) -> web.Response:
        answer = web.Response(
            body=self.tally.exposition().encode(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )
        answer.force_close()
        return answer
