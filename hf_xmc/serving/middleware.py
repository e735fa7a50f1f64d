"""Checks before a request is read, and a log line and metrics after it is answered."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_xmc.serving.errors import problem
from hf_xmc.serving.logs import REQUESTS
from hf_xmc.serving.metrics import Metrics

OPEN_PATHS = {"/", "/health", "/docs", "/openapi.json"}  # paths that need no token
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

logger = logging.getLogger(REQUESTS)


class Observer:
    """Measures and logs each request; an unexpected error becomes status 500.

    Args:
        app: Application to observe. It may put further fields of the log line into ``request.state.log``.
        metrics: Metrics that count the requests.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        log: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = log

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        failed = False
        try:
            await self._app(scope, receive, noted)
        except Exception:
            failed = True
            logger.exception("request failed")
            if status:  # the answer has begun and cannot change: break the connection
                raise
            await problem(500, "the server failed to answer; its log has more.")(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "") or "unmatched"
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.observe(method, route, status or 499, seconds)  # 499: the client has gone
            fields = {"method": method, "route": route, "status": status or 499, "ms": round(1000 * seconds, 2), **log}
            logger.log(logging.ERROR if failed else logging.INFO, "request", extra={"fields": fields})


class TokenCheck:
    """Refuses requests without the token.

    Args:
        app: Application to protect.
        token: Token that clients send as ``Authorization: Bearer``.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._admits(scope):
            await self._app(scope, receive, send)
            return
        detail = "the header `Authorization` must be `Bearer` and the token of this server."
        await problem(401, detail, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(token.strip(), self._token)


class BodyLimit:
    """Refuses bodies that are too large, by their declared size or once they are, and bodies that take too long.

    Args:
        app: Application to protect.
        max_bytes: Maximum size of a body.
        seconds: Maximum time from the start of a request to the end of its body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await problem(413, self._detail(int(declared)))(scope, receive, send)
            return
        received, complete, clock = 0, False, asyncio.get_running_loop().time
        end = clock() + self._seconds

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what follows is the end of the connection, which may take as long as the answer
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - clock()))
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body must arrive within {self._seconds:g} seconds.") from None
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._detail(received))
            return message

        await self._app(scope, limited, send)

    def _detail(self, size: int) -> str:
        return f"the body must be at most {self._max_bytes} bytes, got {size} or more. Send fewer texts per request."
