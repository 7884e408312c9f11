"""The dashboard as an application: its routes, what it refuses before any of them, and what every answer carries."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from stonechat.errors import ConfigError, StonechatError
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from ..fleet.store import Store
from . import accounts, changing, reading
from .access import failed
from .state import Options, State
from .view import View

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-frame-options": "DENY",
}

# What a proxy adds
PROXIES = frozenset(
    ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-server", "x-real-ip")
)


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return failed(error.status_code, error.detail, dict(error.headers or {}))


async def _on_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, ConfigError):
        return failed(400, str(error))
    return failed(503, str(error))


class Guard:
    """Around the application: the name that it was called by, and the headers of every answer."""

    def __init__(self, app: ASGIApp, options: Options) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                names = {name.lower() for name, _ in headers}
                added = dict(HEADERS)
                if b"cache-control" not in names:
                    added["cache-control"] = "no-store"
                if self._options.tls:
                    added["strict-transport-security"] = "max-age=31536000"
                headers += [(name.encode(), value.encode()) for name, value in added.items()]
                message = {**message, "headers": headers}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._options.hosts and host_of(headers.get("host", "")) not in self._options.hosts:
            names = ", ".join(self._options.hosts)
            text = f"called by a name that is not expected; start with --host NAME to allow it beside {names}"
            return failed(421, text)
        if self._options.proxies and scope["scheme"] != "https" and scope["path"].startswith(("/api/", "/metrics")):
            return failed(403, "not by TLS through the proxy of --proxy: does it send X-Forwarded-Proto: https?")
        if self._options.anonymous and not PROXIES.isdisjoint(headers):
            return failed(403, "behind a proxy everybody would be let in: start with --login")
        return None


def host_of(header: str) -> str:
    """ "[::1]:8080" -> "::1", "name:8080" -> "name"."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def make(store: Store, view: View, options: Options, changes: Store | None = None) -> tuple[ASGIApp, State]:
    """changes: the same database for what is written, with a connection of its own -> (the application, what its
    requests share). While it runs, a thread polls the view."""
    state = State(store, changes or store, view, options, accounts.Sessions(store))

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        state.loop, state.news = asyncio.get_running_loop(), asyncio.Event()
        thread = threading.Thread(target=state.poll_for_ever, name="view", daemon=True)
        thread.start()
        try:
            yield
        finally:
            state.stopping = True
            state.wake.set()
            await run_in_threadpool(thread.join, 5.0)

    def get(path: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, answer, methods=["GET"])

    def post(path: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, answer, methods=["POST"])

    app = Starlette(
        routes=[
            get("/", reading.page),
            get("/static/{name}", reading.page),
            get("/metrics", reading.metrics),
            get("/api/session", reading.session),
            get("/api/fleet", reading.fleet),
            get("/api/live", reading.live),
            get("/api/device/{name}", reading.device),
            get("/api/incidents", reading.incidents),
            get("/api/rollouts", reading.rollouts),
            post("/api/rollouts/{number:int}/{act}", changing.rollout),
            get("/api/audit", reading.audit_log),
            post("/api/login", changing.login),
            post("/api/logout", changing.logout),
            post("/api/incidents/{number:int}/acknowledge", changing.acknowledge),
            post("/api/silences", changing.silence),
            post("/api/silences/{name}/end", changing.unsilence),
            post("/api/device/{name}/command", changing.command),
        ],
        exception_handlers={HTTPException: _on_http, StonechatError: _on_error},
        lifespan=lifespan,
    )
    app.state.shared = state
    guarded: Any = Guard(app, options)
    if options.proxies:
        guarded = ProxyHeadersMiddleware(guarded, list(options.proxies))
    return guarded, state
