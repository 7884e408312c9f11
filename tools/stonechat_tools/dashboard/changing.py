"""The dashboard's requests that change something: log-in and log-out, and what an operator does."""

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import accounts, api, audit
from .access import address_of, body_of, check_origin, cookie_name, cookie_of, failed, operator_of, state_of, user_of
from .state import Options, State

Found = TypeVar("Found")


async def _write(state: State, change: Callable[..., Found], *values: Any, **facts: Any) -> Found:
    """change(store, ...) in a thread, by the connection for changes."""
    async with state.writing:
        return await run_in_threadpool(change, state.changes, *values, **facts)


async def login(request: Request) -> Response:
    state = state_of(request)
    check_origin(request)
    asked = await body_of(request)
    name, password = asked.get("name"), asked.get("password")
    if not isinstance(name, str) or not isinstance(password, str) or len(name) > 200 or len(password) > 2000:
        raise HTTPException(400, "want name and password")
    address = address_of(request)
    name = name[: accounts.MAX_NAME]
    async with state.hashing:
        wait_s, crowd_s = state.tries.wait_s(name, address), state.tries.crowd_s(name)
        if crowd_s > wait_s and not await run_in_threadpool(audit.has_logged_in, state.store, name, address):
            wait_s = crowd_s
        if wait_s:
            text = f"too many failed log-ins; try again in {wait_s / 60:.0f} min" if wait_s > 90 else "try again later"
            return failed(429, text, {"retry-after": str(int(wait_s) + 1)})
        account = await run_in_threadpool(accounts.authentic, state.store, name, password)
        noted = account is None and state.tries.failed(name, address)
    who = "".join(letter for letter in name if letter.isprintable())
    if account is None:
        if noted:
            await _write(state, audit.note, who, "log-in refused", address=address)
        raise HTTPException(401, "no such account, or another password")
    await _write(state, audit.note, account.name, "log-in", address=address)
    state.sessions.end(cookie_of(request, state.options))
    cookie, session = state.sessions.begin(account)
    answer = JSONResponse({"user": session.name, "role": session.role})
    _set_cookie(answer, state.options, cookie)
    return answer


def _set_cookie(answer: Response, options: Options, value: str, age_s: int = int(accounts.LONGEST_S)) -> None:
    answer.set_cookie(
        cookie_name(options), value, max_age=age_s, path="/", secure=options.tls, httponly=True, samesite="strict"
    )


async def logout(request: Request) -> Response:
    state = state_of(request)
    check_origin(request)
    user = await run_in_threadpool(user_of, request)
    state.sessions.end(cookie_of(request, state.options))
    if user is not None and user.session is not None:
        await _write(state, audit.note, user.name, "log-out")
    answer = JSONResponse({})
    _set_cookie(answer, state.options, "", 0)
    return answer


async def acknowledge(request: Request) -> Response:
    user = await run_in_threadpool(operator_of, request)
    state = state_of(request)
    await _write(state, api.acknowledge, request.path_params["number"], user.name)
    state.look()
    return JSONResponse({})


async def silence(request: Request) -> Response:
    user = await run_in_threadpool(operator_of, request)
    state = state_of(request)
    found = await _write(state, api.silence, await body_of(request), user.name)
    return JSONResponse({"id": found})


async def unsilence(request: Request) -> Response:
    user = await run_in_threadpool(operator_of, request)
    state = state_of(request)
    await _write(state, api.unsilence, request.path_params["name"][:64], user.name)
    return JSONResponse({})


async def command(request: Request) -> Response:
    user = await run_in_threadpool(operator_of, request)
    state = state_of(request)
    name = request.path_params["name"]
    if state.options.operator is None:
        raise HTTPException(404, "no commands: the dashboard runs without --operator SOCKET")
    if not api.is_name(name):
        raise HTTPException(404, "no such device")
    body = await body_of(request)
    sequence = await _write(state, api.command, state.options.operator, name, body, user.name)
    return JSONResponse({"sequence": sequence})


async def rollout(request: Request) -> Response:
    user = await run_in_threadpool(operator_of, request)
    number, act = request.path_params["number"], request.path_params["act"][:20]
    await _write(state_of(request), api.change_rollout, number, act, await body_of(request), user.name)
    return JSONResponse({})
