"""The dashboard's requests that read. Pages are files that were read at the start, so no path reaches the disk."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..fleet.store import StoreError
from . import accounts, api, audit
from .access import state_of, user_of, viewer_of
from .metrics import text_of
from .state import State

MAX_LIVE, MAX_OF_ONE = 100, 20  # pages that listen, and those of one account
KEEP_ALIVE_S = 15.0


async def page(request: Request) -> Response:
    state = state_of(request)
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


async def session(request: Request) -> Response:
    state = state_of(request)
    user = await run_in_threadpool(user_of, request)
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


async def fleet(request: Request) -> Response:
    await run_in_threadpool(viewer_of, request)
    state = state_of(request)
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


async def live(request: Request) -> Response:
    name = (await run_in_threadpool(viewer_of, request, False)).name
    state = state_of(request)
    if state.live.total() >= MAX_LIVE:
        raise HTTPException(503, f"{MAX_LIVE} pages listen already; close some")
    if name and state.live[name] >= MAX_OF_ONE:
        raise HTTPException(503, f"{MAX_OF_ONE} pages of {name} listen already; close some")
    asked = request.query_params
    try:
        place = asked.get("epoch", "")[:16], int(asked.get("version", "")[:12]), int(asked.get("strings", "")[:12])
    except ValueError:
        raise HTTPException(400, "want epoch, version and strings") from None
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    if request.method == "HEAD":  # it has no end that nobody would wait for
        return Response(headers=headers, media_type="text/event-stream")
    return StreamingResponse(_events(request, state, name, *place), headers=headers, media_type="text/event-stream")


async def _events(
    request: Request, state: State, name: str, epoch: str, version: int, strings: int
) -> AsyncIterator[bytes]:
    state.live[name] += 1
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
                gone = await run_in_threadpool(user_of, request, False) is None
            except StoreError:  # the browser asks again
                return
            if gone:
                yield b"event: ended\ndata: {}\n\n"
                return
    finally:
        state.live[name] -= 1
        if not state.live[name]:
            del state.live[name]


async def device(request: Request) -> Response:
    await run_in_threadpool(viewer_of, request)
    state = state_of(request)
    name, span = request.path_params["name"], request.query_params.get("span", "1d")
    if not api.is_name(name):
        raise HTTPException(404, "no such device")
    if span not in api.SPANS:
        raise HTTPException(400, f"span: want one of {', '.join(api.SPANS)}")
    found = await run_in_threadpool(api.device, state.store, state.view, name, span)
    if found is None:
        raise HTTPException(404, f"{name}: no such device")
    return JSONResponse(found)


async def incidents(request: Request) -> Response:
    await run_in_threadpool(viewer_of, request)
    state = state_of(request)
    return JSONResponse(await run_in_threadpool(api.incidents, state.store, state.view))


async def rollouts(request: Request) -> Response:
    await run_in_threadpool(viewer_of, request)
    return JSONResponse(await run_in_threadpool(api.rollouts, state_of(request).store))


async def audit_log(request: Request) -> Response:
    user = await run_in_threadpool(viewer_of, request)
    if user.session is None or user.role != "operator":
        raise HTTPException(403, "the audit log needs the role operator")
    return JSONResponse({"entries": await run_in_threadpool(audit.entries, state_of(request).store)})


async def metrics(request: Request) -> Response:
    state = state_of(request)
    token = state.options.metrics_token
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token and not accounts.equal(given, token):
        raise HTTPException(401, "want Authorization: Bearer TOKEN")
    if not token and not state.options.anonymous:
        raise HTTPException(404, "no metrics without --metrics-token")
    text = await run_in_threadpool(text_of, state.store, state.view)
    return Response(text, media_type="text/plain; version=0.0.4")
