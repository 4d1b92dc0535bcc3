"""Who may ask: the token, pages in a browser, and how many at a time."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from oxe_mix.errors import UserError
from train_llava.acting.arrays import RequestError

_SHORTEST_TOKEN = 16
_SCHEMES = ("bearer", "api-key")  # openpi-client's `api_key` is sent as Api-Key
_FIRST_REQUEST_S, _FULL_S = 10.0, 0.2
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def is_loopback(host: str) -> bool:
    """Whether an address is only reached from this machine; a name counts only as `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Gate:
    """token: who asks must know it; None: nobody needs one. origins: of pages that may ask, as a browser
    names them (https://robot.example).
    """

    token: str | None = None
    origins: tuple[str, ...] = ()

    def check_host(self, host: str) -> None:
        """Raises: UserError for an address that others reach without a token, or with one to be guessed."""
        if self.token is None and not is_loopback(host):
            raise UserError(f"--host {host}: others can reach it; give a --token that they must know")
        if self.token is not None and (len(self.token) < _SHORTEST_TOKEN or not self.token.isascii()):
            raise UserError(
                f"--token: is shorter than {_SHORTEST_TOKEN} plain characters; take one from "
                "`openssl rand -hex 16`"
            )

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Raises: RequestError for a browser's page: any page that somebody on this machine opens could
        otherwise move the robot.
        """
        origin = headers.get("Origin")
        if origin is not None and origin not in self.origins:
            raise RequestError("Origin", "pages in a browser may not ask; see --allow-origin", "origin")

    def check_token(self, headers: Mapping[str, str]) -> None:
        """Raises: RequestError for a missing or wrong token, after the same time whatever is wrong."""
        if self.token is None:
            return
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(errors="replace"), self.token.encode())
        if not same or scheme.lower() not in _SCHEMES:
            raise RequestError("Authorization", "give the server's token as `Bearer TOKEN`", "token")


class Door:
    """Makes a protocol for each TCP connection: not for too many, and not for long for one that asks nothing.

    aiohttp itself sets no limit to either.
    """

    def __init__(self, server: web.Server, limit: int, turned_away: Callable[[], None]) -> None:
        """`turned_away` is called for each connection above `limit`."""
        self._server, self._limit, self._turned_away = server, limit, turned_away
        self._silent: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}
        self._arriving = 0

    def __call__(self) -> asyncio.BaseProtocol:
        """For the event loop's create_server."""
        if len(self._server.connections) + self._arriving >= self._limit:
            self._turned_away()
            return _Full()
        protocol = self._server()
        loop = asyncio.get_running_loop()
        # The server counts a connection a round of the loop later; many may come in one.
        self._arriving += 1
        loop.call_soon(self._arrived)
        self._silent[protocol] = loop.call_later(_FIRST_REQUEST_S, self._close, protocol)
        return protocol

    def _arrived(self) -> None:
        self._arriving -= 1

    def has_asked(self, request: web.BaseRequest) -> None:
        """A whole head of a request came."""
        if request.protocol is not None and request.protocol in self._silent:
            self._silent.pop(request.protocol).cancel()

    def _close(self, protocol: web.RequestHandler) -> None:
        del self._silent[protocol]
        if protocol.transport is not None:
            protocol.transport.close()


class _Full(asyncio.Protocol):
    """Says no, and reads on for a moment: closed with something unread, a client would not see why."""

    _transport: asyncio.WriteTransport
    _has_said = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        asyncio.get_running_loop().call_later(_FULL_S, self._end)

    def data_received(self, _: bytes) -> None:
        if not self._has_said:
            self._transport.write(_FULL)
        self._has_said = True

    def _end(self) -> None:
        self.data_received(b"")  # also to who asked nothing
        self._transport.close()
