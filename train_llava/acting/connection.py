"""One client on a websocket: its requests one after the other, each answered before the next is begun."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from aiohttp import WebSocketError, WSCloseCode, WSMsgType, web

from train_llava.acting.arrays import RequestError
from train_llava.acting.msgpack_numpy import pack, unpack
from train_llava.acting.service import Reply, Service

_logger = logging.getLogger(__name__)
_MAX_PENDING = 2  # requests of one client: one in hand, and one that it sent too early


class Connection:
    """Reads all the time, since aiohttp answers pings only while somebody reads; answers in a task beside."""

    def __init__(self, socket: web.WebSocketResponse, service: Service) -> None:
        self._socket, self._service = socket, service
        self._inbox: asyncio.Queue[tuple[str | bytes, float]] = asyncio.Queue()
        self._pending = 0
        self._is_stopping = False
        self._last: dict[str, Reply] = {}

    async def run(self) -> None:
        """Until the client goes, or is sent away. What it waited for then is not asked of the model."""
        answering = asyncio.create_task(self._answer_all())
        try:
            await self._read_all()
        finally:
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await answering

    async def stop(self) -> None:
        """Answer what has come, and close."""
        self._is_stopping = True
        if not self._pending:
            await self._go_away()

    async def _read_all(self) -> None:
        errors = self._service.tally.errors
        while True:
            message = await self._socket.receive()
            if message.type in (WSMsgType.BINARY, WSMsgType.TEXT):
                if self._pending == _MAX_PENDING:
                    errors["order"] += 1
                    await self._socket.close(
                        code=WSCloseCode.POLICY_VIOLATION, message=b"wait for an answer before you ask again"
                    )
                    return
                self._pending += 1
                self._inbox.put_nowait((message.data, time.perf_counter()))
                continue
            if message.type is WSMsgType.ERROR and isinstance(message.data, WebSocketError):
                errors["too_large" if message.data.code == WSCloseCode.MESSAGE_TOO_BIG else "message"] += 1
            return

    async def _answer_all(self) -> None:
        while True:
            reply = await self._reply(*await self._inbox.get())
            if isinstance(reply, str):
                await self._socket.send_str(reply)
            else:
                await self._socket.send_bytes(reply)
            self._pending -= 1
            if self._is_stopping and not self._pending:
                await self._go_away()
                return

    async def _reply(self, message: str | bytes, since: float) -> str | bytes:
        """Bytes with actions, or text, which openpi's client raises as an error."""
        try:
            if isinstance(message, str):
                raise RequestError("request", "is text; send msgpack in a binary message", "message")
            reply = await self._service.act(unpack(message), "websocket", self._last, since)
            self._last[reply.unnorm_key] = reply
            return pack(reply.as_message())
        except RequestError as error:
            self._service.tally.errors[error.kind] += 1
            return str(error)
        except Exception:
            _logger.exception("a request on a websocket")
            self._service.tally.errors["internal"] += 1
            return "server: could not answer; its log says why"

    async def _go_away(self) -> None:
        await self._socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server stops")
