"""Pure ASGI middleware: request ids, request logging, body limits, and the edge of Serve.

Every response carries an X-Request-Id, which is bound to the log while the request runs.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from uuid import uuid4

import structlog
from opentelemetry.trace import format_trace_id, get_current_span
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from restoration.errors import InvalidRequest, UploadTooSlow
from serve_app.asgi.errors import internal_error_response, problem_document
from serve_app.asgi.flow_control import FlowControlledEdge
from serve_app.asgi.security_headers import RESPONSE_STARTS, SecurityHeaders

log = structlog.get_logger(__name__)

REQUEST_ID = "X-Request-Id"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Polled every few seconds by load balancers: neither logged nor traced.
QUIET_PATHS = frozenset({"/healthz", "/readyz"})


class RequestContext:
    """Assigns request ids, logs requests, and answers unhandled exceptions with a 500.

    A dependency of a route may set `request.state.answer_headers`, which every response then has.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _request_id(Headers(scope=scope))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers.update(state.get("answer_headers", {}))
            await send(message)

        ids = {"request_id": request_id}
        if (span := get_current_span().get_span_context()).is_valid:
            ids["trace_id"] = format_trace_id(span.trace_id)
        started = time.monotonic()
        with structlog.contextvars.bound_contextvars(**ids):
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception:
                log.exception("request_crashed", method=scope["method"], path=scope["path"])
                if status is not None:
                    raise  # the headers are sent, so the connection can only be cut
                await internal_error_response(Request(scope))(scope, receive, send_with_headers)
            finally:
                if scope["path"] not in QUIET_PATHS:
                    log.info(
                        "request",
                        method=scope["method"],
                        path=scope["path"],
                        status=status,
                        took_s=round(time.monotonic() - started, 4),
                    )


def _request_id(headers: Headers) -> str:
    offered = headers.get(REQUEST_ID, "")
    return offered if _SANE_REQUEST_ID.fullmatch(offered) else uuid4().hex


@dataclass(frozen=True, slots=True)
class Limit:
    """The maximal size of a request body, and the error raised for a larger one."""

    max_bytes: int
    error: type[InvalidRequest]

    def exceeded(self) -> InvalidRequest:
        return self.error(
            f"the request body is larger than {self.max_bytes} bytes; send less in one request",
            max_bytes=self.max_bytes,
        )


class BodyLimit:
    """Refuses a body above the limit while it is read, so that it is never held in full.

    The bytes that arrive are counted; Content-Length only allows an earlier refusal. A route may
    set `count_body` in the request's state to be called with each size. A request that is answered
    without reading its body needs no limit. `paths` gives the limits of single paths.
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
                count: Callable[[int], None] | None = scope.get("state", {}).get("count_body")
                if count is not None:
                    count(len(message.get("body", b"")))
            return message

        await self._app(scope, receive_within_limit, send)


class BodyPace:
    """Refuses a body that arrives too slowly, since it would occupy an upload slot indefinitely.

    Only the time spent waiting for the sender counts. As in Apache's mod_reqtimeout, every body may
    take PATIENCE_S, plus a second for each SLOWEST_BYTES_S received (decision 26 in
    docs/decisions).
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
            if complete:  # the only message left is http.disconnect, which may come at any time
                return await receive()
            asked_at = time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    message = await receive()
            except TimeoutError:
                raise UploadTooSlow(
                    f"the request body arrived at less than {self.SLOWEST_BYTES_S} bytes a second; "
                    "send it again over a faster connection"
                ) from None
            arrived = len(message.get("body", b""))
            left_s += arrived / self.SLOWEST_BYTES_S - (time.monotonic() - asked_at)
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


# Request headers that Ray Serve obeys or forwards (ray.serve._private, 2.60): the model and the
# session to route by, the timeout, and whether a disconnect cancels the request. In lower case and
# with hyphens: Serve reads an underscore as a hyphen in some of them, as proxies do.
_STEERING_HEADERS = frozenset(
    {
        "serve-multiplexed-model-id",
        "x-session-id",
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
    }
)
_STEERING_PREFIX = "x-serve-router-"
# Serve decodes these as UTF-8, and fails if they are not.
_DECODED_HEADERS = frozenset({"traceparent", "tracestate"})
# Serve's own paths list the running applications and report the proxy's health. The health path
# stays open: it reveals a single word, and probes without a token need it, those of HAProxy and of
# KubeRay's operator.
_SERVES_PATHS = "/-/"
_SERVES_HEALTH = "/-/healthz"


class ServeEdge:
    """Outermost middleware, around Ray Serve itself: protects it from what clients may send.

    Serve lets request headers steer it, fails with a plain 500 if their bytes are not UTF-8, lists
    its applications to anyone, and fails for a websocket without a route. The middleware runs
    around Serve's own HTTP proxy, and around each replica when HAProxy is in front.
    `session_header` is the further name that Serve is configured to read session ids from.
    """

    def __init__(self, app: ASGIApp, session_header: str = "") -> None:
        self._app = app
        self._stripped = _STEERING_HEADERS | {_hyphenated(session_header)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = MutableHeaders(raw=[each for each in scope["headers"] if self._may_pass(*each)])
        headers[REQUEST_ID] = request_id = _request_id(headers)
        scope["headers"] = headers.raw

        async def send_one_request_id(message: Message) -> None:
            if message["type"] in RESPONSE_STARTS:
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        if _is_for_serve_alone(scope):
            refusal = problem_document(
                HTTPStatus.NOT_FOUND, "not_found", "Not Found", scope["path"], request_id
            )
            return await refusal(scope, receive, send_one_request_id)
        await self._app(scope, receive, send_one_request_id)

    def _may_pass(self, raw_name: bytes, value: bytes) -> bool:
        name = _hyphenated(raw_name.decode("latin-1"))
        if name in _DECODED_HEADERS:
            return value.isascii()
        return name not in self._stripped and not name.startswith(_STEERING_PREFIX)


def _hyphenated(name: str) -> str:
    return name.lower().replace("_", "-")


def _is_for_serve_alone(scope: Scope) -> bool:
    """Return whether only Serve itself would answer this request.

    That holds for Serve's own paths, and for a websocket whose target is not a path. (For other
    requests HTTP servers turn an absolute URL into a path.)
    """
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    if scope["type"] == "websocket":
        return not path.startswith("/") or path.startswith(_SERVES_PATHS)
    return path.startswith(_SERVES_PATHS) and path != _SERVES_HEALTH


def serve_edge() -> list[Middleware]:
    """Return the middleware for RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, on every Serve node."""
    session_header = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "")
    return [
        Middleware(FlowControlledEdge),
        Middleware(ServeEdge, session_header=session_header),
        Middleware(SecurityHeaders),
    ]
