"""Pure ASGI middleware: request ids, the log of requests, limits of bodies, and Serve's edge.

Every answer carries an X-Request-Id, which is bound to the log while the request runs.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from restoration.errors import InvalidRequest, UploadTooSlow
from restoration.tracing import HEADER, NullTracer, TraceContext, Tracer, spanning
from serve_app.errors import internal_error_response
from serve_app.headers import SecurityHeaders

log = structlog.get_logger(__name__)

REQUEST_ID = "X-Request-Id"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET_PATHS = frozenset({"/healthz", "/readyz"})  # asked every few seconds by load balancers


class RequestContext:
    """Names each request, logs and traces how it went, and turns what nobody caught into a 500
    problem. The trace is the caller's (`traceparent`), or begins here."""

    def __init__(self, app: ASGIApp, tracer: Tracer | None = None) -> None:
        self._app = app
        self._tracer = tracer or NullTracer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        name, attributes = _span_of(scope)
        callers = TraceContext.parse(headers.get(HEADER))
        tracer = NullTracer() if scope["path"] in _QUIET_PATHS else self._tracer
        with spanning(tracer, name, attributes, "server", callers) as here:
            ids = {"request_id": _request_id(headers), "trace_id": here.trace_id}
            with structlog.contextvars.bound_contextvars(**ids):
                await self._answer(scope, receive, send, ids["request_id"])

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id, scope["state"])
        started = time.monotonic()
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            log.exception("request_crashed", method=scope["method"], path=scope["path"])
            if answer.status is not None:
                raise  # the head is out; all that is left is to cut the connection
            await internal_error_response(Request(scope))(scope, receive, answer.send)
        finally:
            if scope["path"] not in _QUIET_PATHS:
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=answer.status,
                    took_s=round(time.monotonic() - started, 4),
                )


def _span_of(scope: Scope) -> tuple[str, dict[str, str | int | float]]:
    """Name and attributes, as OpenTelemetry's conventions for HTTP have them where the route is
    not known: a path, with its ids, is no name."""
    method = scope["method"]
    return method, {"http.request.method": method, "url.path": scope["path"]}


class _Answer:
    """Adds the request's id, and what a dependency of the route has left in
    `request.state.answer_headers`, and remembers the status."""

    def __init__(self, send: Send, request_id: str, state: Mapping[str, Any]) -> None:
        self._send = send
        self._request_id = request_id
        self._state = state
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID] = self._request_id
            headers.update(self._state.get("answer_headers", {}))
        await self._send(message)


def _request_id(headers: Headers) -> str:
    offered = headers.get(REQUEST_ID, "")
    return offered if _SANE_REQUEST_ID.fullmatch(offered) else uuid4().hex


@dataclass(frozen=True, slots=True)
class Limit:
    """The bytes that a request's body may have, and the error that one beyond them is."""

    max_bytes: int
    error: type[InvalidRequest]

    def exceeded(self) -> InvalidRequest:
        return self.error(
            f"the request is larger than {self.max_bytes} bytes; send less at a time",
            max_bytes=self.max_bytes,
        )


class BodyLimit:
    """Refuses a body above the limit while it is read, so that it is never held in full.

    What arrives is counted; Content-Length only lets a refusal come sooner. A request that is
    answered without reading its body costs nothing and needs no limit. The paths in `paths` have
    limits of their own.
    """

    def __init__(self, app: ASGIApp, limit: Limit, paths: Mapping[str, Limit]) -> None:
        self._app = app
        self._limit = limit
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._paths.get(scope["path"], self._limit)
        declared = Headers(scope=scope).get("content-length", "")
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            if declared.isdecimal() and int(declared) > limit.max_bytes:
                raise limit.exceeded()
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit.max_bytes:
                    raise limit.exceeded()
            return message

        await self._app(scope, receive_within_limit, send)


class BodyPace:
    """Refuses a body that trickles in: it would hold the place of an upload as long as it likes.

    What counts is time spent waiting for the sender, by the rule of Apache's mod_reqtimeout: so
    many seconds for any body, and more for what has arrived (decision 26 in docs/decisions).
    """

    PATIENCE_S = 60.0
    SLOWEST_BYTES_S = 16 * 1024

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        left_s, complete = self.PATIENCE_S, False

        async def receive_in_time() -> Message:
            nonlocal left_s, complete
            if complete:  # what comes now is that the client has gone, whenever that is
                return await receive()
            asked_at = time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            arrived = len(message.get("body", b""))
            left_s += arrived / self.SLOWEST_BYTES_S - (time.monotonic() - asked_at)
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)

    def _too_slow(self) -> UploadTooSlow:
        return UploadTooSlow(
            f"the request came too slowly, with less than {self.SLOWEST_BYTES_S} bytes a second "
            "for too long; send it again over a better connection"
        )


class ServeEdge:
    """Outermost, around Ray Serve itself: mends what its HTTP server does with headers.

    Serve obeys a client's `x-request-timeout-seconds`, with which anybody could have a request
    cut or kept at will, before the application sees it; and it appends an X-Request-Id to
    answers that have one already (ray.serve._private.http_util, 2.60).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = MutableHeaders(scope=scope)
        del headers["x-request-timeout-seconds"]
        headers[REQUEST_ID] = _request_id(headers)

        async def send_one_request_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = headers[REQUEST_ID]
            await send(message)

        await self._app(scope, receive, send_one_request_id)


def serve_edge() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, on every node that runs Serve."""
    return [Middleware(ServeEdge), Middleware(SecurityHeaders)]
