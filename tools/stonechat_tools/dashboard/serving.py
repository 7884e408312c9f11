"""The dashboard's server: uvicorn, with limits for those who connect and then say or read nothing."""

import asyncio
import contextlib
import ipaddress
import socket
from collections import Counter
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from stonechat.errors import ConfigError
from uvicorn.protocols.http.h11_impl import H11Protocol

from .accounts import network
from .state import State

MAX_CONNECTIONS = 400
MAX_OF_ADDRESS = 200  # that many of one address, or of one network of IPv6
REQUEST_S = 20.0  # until a whole head of a request has arrived, at most twice that
STALLED_S = 60.0  # a client that takes nothing for so long is gone


class _Protocol(H11Protocol):
    """Ends a connection that is open for REQUEST_S without a request: MAX_CONNECTIONS of them would keep all others
    out. For the same reason no address but a proxy's has more than MAX_OF_ADDRESS. held, proxies: of the server."""

    held: Counter[str]
    proxies: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    _place: str | None = None  # what it counts for in `held`
    _timer: asyncio.TimerHandle | None = None
    _waiting: Any = object()  # what `cycle` was when the connection was last seen to wait for a request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        address = self.client[0] if self.client else ""
        if not self._is_proxy(address):
            self._place = network(address)
            self.held[self._place] += 1
            if self.held[self._place] > MAX_OF_ADDRESS:
                self.transport.abort()
                return
        self._look()

    def _is_proxy(self, address: str) -> bool:
        with contextlib.suppress(ValueError):
            found = ipaddress.ip_address(address.partition("%")[0])
            return any(found in each for each in self.proxies)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._place is not None:
            self.held[self._place] -= 1
            if not self.held[self._place]:
                del self.held[self._place]
        super().connection_lost(exc)

    def _look(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._waiting is self.cycle:
            self.transport.abort()
            return
        self._waiting = self.cycle if waits else self
        self._timer = self.loop.call_later(REQUEST_S, self._look)


class Server(uvicorn.Server):
    """Ends the event streams when it ends. cert, key: files, for TLS."""

    def __init__(self, app: ASGIApp, state: State | None, cert: str | None = None, key: str | None = None) -> None:
        self._state = state
        networks = tuple(map(ipaddress.ip_network, state.options.proxies if state is not None else ()))
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=True,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=20,
                timeout_graceful_shutdown=1,
                ssl_certfile=cert,
                ssl_keyfile=key,
                lifespan="on" if state is not None else "off",
                http=type("_Limited", (_Protocol,), {"held": Counter(), "proxies": networks}),
                ws="none",
                h11_max_incomplete_event_size=16_384,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._state is not None:
            self._state.end()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """port: 0 for any that is free. Raises ConfigError."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(AttributeError, OSError):  # Linux; the connections inherit it
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_S * 1000))
            found.bind(where)
            found.listen(128)
            found.set_inheritable(True)
        except BaseException:
            found.close()
            raise
        return found
    except OSError as error:
        raise ConfigError(f"--listen {host}:{port}: {error.strerror or error}") from None
