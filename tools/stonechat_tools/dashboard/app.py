"""The dashboard's requests: who may ask what, and what every answer carries.

Pages are files that were read at the start, so no path reaches the disk. Without a session nothing but the pages and
the log-in is given out, unless the dashboard is bound to loopback: there everybody is a viewer. What changes something
needs an operator's session, its token in a header, and the Origin of this very page.
"""

import asyncio
import contextlib
import gzip
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from stonechat.errors import ConfigError, StonechatError

from ..fleet.store import Store, StoreError
from . import accounts, api, audit
from .metrics import text_of
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
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_BODY = 16_384
MAX_LIVE = 100  # browsers that listen
POLL_S, IDLE_POLL_S = 1.0, 10.0  # how often the database is read while somebody looks, and while nobody does
SHARE = 10.0  # a look at the database is followed by a pause of at least that many times its length
KEEP_ALIVE_S = 15.0
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class Options:
    """anonymous: everybody who reaches it is a viewer (loopback); hosts: names that it may be called by, empty for any;
    operator: the socket of `stonechat operator`; metrics_token: for Prometheus, "" for none."""

    anonymous: bool = True
    hosts: tuple[str, ...] = LOOPBACK
    tls: bool = False
    operator: Path | None = None
    metrics_token: str = ""


@dataclass(slots=True)
class File:
    body: bytes
    packed: bytes
    kind: str
    tag: str


def load_files() -> dict[str, File]:
    """The pages, by name."""
    found = {}
    for each in resources.files(__package__).joinpath("static").iterdir():
        body = each.read_bytes()
        tag = '"' + hashlib.sha256(body).hexdigest()[:20] + '"'
        kind = TYPES[each.name.rpartition(".")[2]]
        found[each.name] = File(body, gzip.compress(body, 9, mtime=0), kind, tag)
    return found


@dataclass(slots=True)
class User:
    """session: None for one who has not logged in."""

    name: str
    role: str
    session: accounts.Session | None = None


@dataclass
class State:
    """What all requests share. The view is polled by a thread of its own."""

    store: Store
    view: View
    options: Options
    sessions: accounts.Sessions
    tries: accounts.Tries = field(default_factory=accounts.Tries)
    files: dict[str, File] = field(default_factory=load_files)
    live: int = 0
    error: str | None = None
    stopping: bool = False
    wake: threading.Event = field(default_factory=threading.Event)
    news: asyncio.Event | None = None
    loop: asyncio.AbstractEventLoop | None = None
    hashing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def poll_for_ever(self) -> None:
        while not self.stopping:
            began_s = time.monotonic()
            try:
                changed, error = self.view.poll(), None
            except StoreError as failed:
                changed, error = False, str(failed)
            except Exception as failed:  # what somebody else has written into the database
                changed, error = False, f"the database can't be read: {type(failed).__name__}: {failed}"[:300]
            if changed or error != self.error:
                self.error = error
                self.wake_up()
            spent_s = time.monotonic() - began_s
            often = self.live or error is not None or not self.view.ready
            self.wake.wait(max(POLL_S if often else IDLE_POLL_S, SHARE * spent_s))
            self.wake.clear()

    def end(self) -> None:
        """In the loop: end the streams, which would go on for ever."""
        self.stopping = True
        self.wake.set()
        self._renew()

    def wake_up(self) -> None:
        """Wake up the browsers' streams."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed: the server ends
                self.loop.call_soon_threadsafe(self._renew)

    def _renew(self) -> None:
        before, self.news = self.news, asyncio.Event()
        if before is not None:
            before.set()

    def look(self) -> None:
        """Read the database now."""
        self.wake.set()


# --- who asks ---------------------------------------------------------------------------------------------------------


def _cookie_name(options: Options) -> str:
    return "__Host-stonechat" if options.tls else "stonechat"


def _cookie(request: Request, options: Options) -> str:
    jar = SimpleCookie()
    try:
        jar.load(request.headers.get("cookie", "")[:4096])
    except CookieError:
        return ""
    found = jar.get(_cookie_name(options))
    return found.value if found else ""


def _user(request: Request) -> User | None:
    """Raises StoreError."""
    state: State = request.app.state.shared
    cookie = _cookie(request, state.options)
    session = state.sessions.get(cookie) if cookie else None
    if session is not None:
        return User(session.name, session.role, session)
    return User("", "viewer") if state.options.anonymous else None


def _viewer(request: Request) -> User:
    found = _user(request)
    if found is None:
        raise HTTPException(401, "log in first")
    return found


def _same_origin(request: Request) -> None:
    """Raises HTTPException for a request that another page has made."""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin", "")
    if origin not in (f"http://{host}", f"https://{host}") or not host:
        raise HTTPException(403, "this request comes from another page")
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise HTTPException(403, "this request comes from another page")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "want application/json")


def _operator(request: Request) -> User:
    _same_origin(request)
    user = _viewer(request)
    if user.session is None:
        raise HTTPException(401, "log in first")
    if not accounts.equal(request.headers.get("x-csrf-token", ""), user.session.csrf):
        raise HTTPException(403, "the token of this page has expired; load it again")
    if user.role != "operator":
        raise HTTPException(403, f"{user.name} is a viewer; this needs the role operator")
    return user


async def _body(request: Request) -> dict[str, Any]:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise HTTPException(413, f"more than {MAX_BODY} bytes")
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise HTTPException(400, "not JSON") from None
    if not isinstance(found, dict):
        raise HTTPException(400, "want an object")
    return found


def _shared(request: Request) -> State:
    state: State = request.app.state.shared
    return state


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


# --- pages and reading ------------------------------------------------------------------------------------------------


async def _page(request: Request) -> Response:
    state = _shared(request)
    name = request.path_params.get("name", "index.html")
    found = state.files.get(name)
    if found is None:
        raise HTTPException(404, "no such page")
    headers = {"etag": found.tag, "cache-control": "no-cache", "vary": "accept-encoding"}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.packed, headers=headers | {"content-encoding": "gzip"}, media_type=found.kind)
    return Response(found.body, headers=headers, media_type=found.kind)


async def _session(request: Request) -> Response:
    state = _shared(request)
    user = await run_in_threadpool(_user, request)
    return JSONResponse(
        {
            "user": user.name if user else None,
            "role": user.role if user else None,
            "csrf": user.session.csrf if user and user.session else "",
            "commands": list(api.COMMANDS)
            if user and user.role == "operator" and state.options.operator is not None
            else [],
            "lasting": list(api.LASTING),
        }
    )


async def _fleet(request: Request) -> Response:
    await run_in_threadpool(_viewer, request)
    state = _shared(request)
    if not state.view.ready:
        if state.error is not None:
            raise HTTPException(503, state.error)
        await run_in_threadpool(_first_look, state)
    data = await run_in_threadpool(state.view.snapshot)
    return Response(data, headers={"content-encoding": "gzip"}, media_type="application/json")


def _first_look(state: State) -> None:
    end_s = time.monotonic() + 30.0
    while not state.view.ready and state.error is None and time.monotonic() < end_s and not state.stopping:
        time.sleep(0.02)
    if not state.view.ready:
        raise HTTPException(503, state.error or "the database is still being read")


async def _live(request: Request) -> Response:
    await run_in_threadpool(_viewer, request)
    state = _shared(request)
    if state.live >= MAX_LIVE:
        raise HTTPException(503, f"{MAX_LIVE} browsers listen already")
    asked = request.query_params
    try:
        place = asked.get("epoch", "")[:16], int(asked.get("version", "")[:12]), int(asked.get("strings", "")[:12])
    except ValueError:
        raise HTTPException(400, "want epoch, version and strings") from None
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_events(request, state, *place), headers=headers, media_type="text/event-stream")


async def _events(request: Request, state: State, epoch: str, version: int, strings: int) -> AsyncIterator[bytes]:
    state.live += 1
    state.look()
    error: str | None = None
    stale: Any = None
    try:
        yield b"retry: 3000\n\n"
        while not state.stopping:
            news = state.news
            found = await run_in_threadpool(state.view.changes, epoch, version, strings)
            if found is None:
                yield b"event: reset\ndata: {}\n\n"
                return
            about = json.loads(found)
            if about["version"] != version or about["stale"] != stale:
                version, stale = about["version"], about["stale"]
                strings += len(about["strings"])
                yield b"data: " + found + b"\n\n"
            if error != state.error:
                error = state.error
                yield b"event: trouble\ndata: " + json.dumps({"error": error}).encode() + b"\n\n"
            try:
                if news is None:
                    await asyncio.sleep(0.2)
                else:
                    await asyncio.wait_for(news.wait(), KEEP_ALIVE_S)
            except TimeoutError:
                yield b": still here\n\n"
            try:
                gone = await run_in_threadpool(_user, request) is None
            except StoreError:  # the browser asks again
                return
            if gone:
                yield b"event: ended\ndata: {}\n\n"
                return
    finally:
        state.live -= 1


async def _device(request: Request) -> Response:
    await run_in_threadpool(_viewer, request)
    state = _shared(request)
    name, span = request.path_params["name"], request.query_params.get("span", "1d")
    if not api.is_name(name):
        raise HTTPException(404, "no such device")
    if span not in api.SPANS:
        raise HTTPException(400, f"span: want one of {', '.join(api.SPANS)}")
    found = await run_in_threadpool(api.device, state.store, state.view, name, span)
    if found is None:
        raise HTTPException(404, f"{name}: no such device")
    return JSONResponse(found)


async def _incidents(request: Request) -> Response:
    await run_in_threadpool(_viewer, request)
    state = _shared(request)
    return JSONResponse(await run_in_threadpool(api.incidents, state.store, state.view))


async def _rollouts(request: Request) -> Response:
    await run_in_threadpool(_viewer, request)
    return JSONResponse(await run_in_threadpool(api.rollouts, _shared(request).store))


async def _audit(request: Request) -> Response:
    user = await run_in_threadpool(_viewer, request)
    if user.session is None or user.role != "operator":
        raise HTTPException(403, "the audit log needs the role operator")
    return JSONResponse({"entries": await run_in_threadpool(audit.entries, _shared(request).store)})


async def _metrics(request: Request) -> Response:
    state = _shared(request)
    token = state.options.metrics_token
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token and not accounts.equal(given, token):
        raise HTTPException(401, "want Authorization: Bearer TOKEN")
    if not token and not state.options.anonymous:
        raise HTTPException(404, "no metrics without --metrics-token")
    text = await run_in_threadpool(text_of, state.store, state.view)
    return Response(text, media_type="text/plain; version=0.0.4")


# --- what changes something -------------------------------------------------------------------------------------------


async def _login(request: Request) -> Response:
    state = _shared(request)
    _same_origin(request)
    asked = await _body(request)
    name, password = asked.get("name"), asked.get("password")
    if not isinstance(name, str) or not isinstance(password, str) or len(name) > 200 or len(password) > 2000:
        raise HTTPException(400, "want name and password")
    address = _address(request)
    name = name[: accounts.MAX_NAME]
    async with state.hashing:
        wait_s = state.tries.wait_s(name, address)
        if wait_s:
            text = f"too many failed log-ins; try again in {wait_s / 60:.0f} min" if wait_s > 90 else "try again later"
            return _failed(429, text, {"retry-after": str(int(wait_s) + 1)})
        account = await run_in_threadpool(accounts.authentic, state.store, name, password)
        noted = account is None and state.tries.failed(name, address)
    who = "".join(letter for letter in name if letter.isprintable())
    if account is None:
        if noted:
            await run_in_threadpool(audit.note, state.store, who, "log-in refused", address=address)
        raise HTTPException(401, "no such account, or another password")
    await run_in_threadpool(audit.note, state.store, account.name, "log-in", address=address)
    state.sessions.end(_cookie(request, state.options))
    cookie, session = state.sessions.begin(account)
    answer = JSONResponse({"user": session.name, "role": session.role})
    _set_cookie(answer, state.options, cookie)
    return answer


def _set_cookie(answer: Response, options: Options, value: str, age_s: int = int(accounts.LONGEST_S)) -> None:
    answer.set_cookie(
        _cookie_name(options), value, max_age=age_s, path="/", secure=options.tls, httponly=True, samesite="strict"
    )


async def _logout(request: Request) -> Response:
    state = _shared(request)
    _same_origin(request)
    user = await run_in_threadpool(_user, request)
    state.sessions.end(_cookie(request, state.options))
    if user is not None and user.session is not None:
        await run_in_threadpool(audit.note, state.store, user.name, "log-out")
    answer = JSONResponse({})
    _set_cookie(answer, state.options, "", 0)
    return answer


async def _acknowledge(request: Request) -> Response:
    user = await run_in_threadpool(_operator, request)
    state = _shared(request)
    await run_in_threadpool(api.acknowledge, state.store, request.path_params["number"], user.name)
    state.look()
    return JSONResponse({})


async def _silence(request: Request) -> Response:
    user = await run_in_threadpool(_operator, request)
    state = _shared(request)
    found = await run_in_threadpool(api.silence, state.store, await _body(request), user.name)
    return JSONResponse({"id": found})


async def _unsilence(request: Request) -> Response:
    user = await run_in_threadpool(_operator, request)
    state = _shared(request)
    await run_in_threadpool(api.unsilence, state.store, request.path_params["name"][:64], user.name)
    return JSONResponse({})


async def _command(request: Request) -> Response:
    user = await run_in_threadpool(_operator, request)
    state = _shared(request)
    name = request.path_params["name"]
    if state.options.operator is None:
        raise HTTPException(404, "no commands: the dashboard runs without --operator SOCKET")
    if not api.is_name(name):
        raise HTTPException(404, "no such device")
    body = await _body(request)
    sequence = await run_in_threadpool(api.command, state.store, state.options.operator, name, body, user.name)
    return JSONResponse({"sequence": sequence})


async def _rollout(request: Request) -> Response:
    user = await run_in_threadpool(_operator, request)
    number, act = request.path_params["number"], request.path_params["act"][:20]
    await run_in_threadpool(api.change_rollout, _shared(request).store, number, act, await _body(request), user.name)
    return JSONResponse({})


# --- the application --------------------------------------------------------------------------------------------------


def _failed(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers)


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _failed(error.status_code, error.detail, dict(error.headers or {}))


async def _on_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, ConfigError):
        return _failed(400, str(error))
    return _failed(503, str(error))


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
            text = f"called by a name that is not expected; start with --host to allow it: {self._options.hosts}"
            return _failed(421, text)
        if self._options.anonymous and ("x-forwarded-for" in headers or "forwarded" in headers):
            return _failed(403, "behind a proxy everybody would be let in: start with --login")
        return None


def host_of(header: str) -> str:
    """ "[::1]:8080" -> "::1", "name:8080" -> "name"."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def make(store: Store, view: View, options: Options) -> tuple[ASGIApp, State]:
    """-> (the application, what its requests share). While it runs, a thread polls the view."""
    state = State(store, view, options, accounts.Sessions(store))

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
            get("/", _page),
            get("/static/{name}", _page),
            get("/metrics", _metrics),
            get("/api/session", _session),
            get("/api/fleet", _fleet),
            get("/api/live", _live),
            get("/api/device/{name}", _device),
            get("/api/incidents", _incidents),
            get("/api/rollouts", _rollouts),
            post("/api/rollouts/{number:int}/{act}", _rollout),
            get("/api/audit", _audit),
            post("/api/login", _login),
            post("/api/logout", _logout),
            post("/api/incidents/{number:int}/acknowledge", _acknowledge),
            post("/api/silences", _silence),
            post("/api/silences/{name}/end", _unsilence),
            post("/api/device/{name}/command", _command),
        ],
        exception_handlers={HTTPException: _on_http, StonechatError: _on_error},
        lifespan=lifespan,
    )
    app.state.shared = state
    return Guard(app, options), state
