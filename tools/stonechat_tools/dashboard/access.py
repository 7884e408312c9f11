"""Who asks, and whether the request is one of the dashboard's own pages.

Without a session nothing but the pages and the log-in is given out, unless the dashboard is bound to loopback: there
everybody is a viewer. What changes something needs an operator's session, its token in a header, and the Origin of this
very page.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from . import accounts
from .state import Options, State

MAX_BODY = 16_384
BODY_S = 20.0


@dataclass(slots=True)
class User:
    """session: None for one who has not logged in."""

    name: str
    role: str
    session: accounts.Session | None = None


def cookie_name(options: Options) -> str:
    return "__Host-stonechat" if options.tls else "stonechat"


def cookie_of(request: Request, options: Options) -> str:
    """Other programs on this host set cookies for it, too: whatever theirs are like, this one is found."""
    return request.cookies.get(cookie_name(options), "")


def user_of(request: Request, used: bool = True) -> User | None:
    """Raises StoreError."""
    used = used and "x-automatic" not in request.headers
    state: State = request.app.state.shared
    cookie = cookie_of(request, state.options)
    session = state.sessions.get(cookie, used) if cookie else None
    if session is not None:
        return User(session.name, session.role, session)
    return User("", "viewer") if state.options.anonymous else None


def viewer_of(request: Request, used: bool = True) -> User:
    found = user_of(request, used)
    if found is None:
        raise HTTPException(401, "log in first")
    return found


def check_origin(request: Request) -> None:
    """Raises HTTPException for a request that another page has made."""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin", "")
    if origin not in (f"http://{host}", f"https://{host}") or not host:
        raise HTTPException(403, "this request comes from another page")
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise HTTPException(403, "this request comes from another page")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "want application/json")


def operator_of(request: Request) -> User:
    check_origin(request)
    user = viewer_of(request)
    if user.session is None:
        raise HTTPException(401, "log in first")
    if not accounts.equal(request.headers.get("x-csrf-token", ""), user.session.csrf):
        raise HTTPException(403, "the token of this page has expired; load it again")
    if user.role != "operator":
        raise HTTPException(403, f"{user.name} is a viewer; this needs the role operator")
    return user


async def body_of(request: Request) -> dict[str, Any]:
    data = b""
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > MAX_BODY:
                    raise HTTPException(413, f"more than {MAX_BODY} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {BODY_S:.0f} s") from None
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise HTTPException(400, "not JSON") from None
    if not isinstance(found, dict):
        raise HTTPException(400, "want an object")
    return found


def state_of(request: Request) -> State:
    state: State = request.app.state.shared
    return state


def address_of(request: Request) -> str:
    return request.client.host if request.client else ""


def failed(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text.encode("utf-8", "replace").decode()}, status, headers)
