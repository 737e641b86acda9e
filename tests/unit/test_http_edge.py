"""The edge around Ray Serve: which headers reach it, and which requests never do."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any
from uuid import uuid4

import pytest
from ray.serve._private import constants
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.asgi.middleware import serve_edge
from serve_app.asgi.security_headers import SECURITY_HEADERS
from tests.fakes.site import open_site

# Every name under which Ray Serve reads a request header, as spelled in its source.
SERVES_HEADERS = {
    value
    for name, value in vars(constants).items()
    if name == "SERVE_MULTIPLEXED_MODEL_ID"
    or name == "SERVE_SESSION_ID"
    or (name.startswith("SERVE_") and "HEADER" in name)
} - {constants.SERVE_HTTP_REQUEST_ID_HEADER}


def _spellings(name: str) -> list[str]:
    hyphens = name.replace("_", "-")
    underscores = name.replace("-", "_")
    mixed = underscores.replace("_", "-", 1)
    return [hyphens, underscores, mixed, hyphens.title(), underscores.upper()]


class _Server:
    """A stand-in for the HTTP server: sends requests through the edge and keeps the results."""

    def __init__(self) -> None:
        self.reached: Scope | None = None
        self._app: ASGIApp = self._serve
        for middleware in serve_edge():  # from the inside out, in Serve's order
            self._app = middleware.cls(self._app, *middleware.args, **middleware.kwargs)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.reached = scope
        if scope["type"] == "http":
            await JSONResponse(dict(Request(scope).headers))(scope, receive, send)

    async def request(
        self, kind: str, path: str = "/", headers: list[tuple[bytes, bytes]] | None = None
    ) -> list[Message]:
        scope: dict[str, Any] = {
            "type": kind,
            "path": path,
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"edge.test"), *(headers or [])],
            "extensions": {"websocket.http.response": {}},
        }
        if kind == "http":
            scope["method"] = "GET"
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": f"{kind}.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent

    @property
    def names(self) -> set[str]:
        """Return the names of the headers that reached Serve."""
        assert self.reached is not None
        return {name.decode("latin-1") for name, _ in self.reached["headers"]}


@pytest.fixture
def server() -> _Server:
    return _Server()


def test_serve_reads_the_headers_that_these_tests_know() -> None:
    """Ray's constants are unchanged: an upgrade that renames them needs a review."""
    assert {
        "serve_multiplexed_model_id",
        "x-session-id",
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "x-serve-router-",
    } <= SERVES_HEADERS


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("name", sorted(SERVES_HEADERS))
async def test_no_header_that_steers_serve_reaches_it(
    server: _Server, kind: str, name: str
) -> None:
    """It is dropped in any spelling that Serve accepts, when doubled, and with non-text bytes."""
    full = f"{name}x" if name.endswith("-") else name  # a prefix
    headers = [
        (spelling.encode(), value)
        for spelling in _spellings(full)
        for value in (b"?1", b"0.001", b"\xff")
    ]
    await server.request(kind, headers=[*headers, (b"x-kept", b"\xff"), *headers])
    assert server.names == {"host", "x-kept", "x-request-id"}


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_a_session_header_of_the_operators_choice_is_stripped_as_well(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAY_SERVE_SESSION_ID_HEADER_KEY gives Serve another name to look for."""
    monkeypatch.setenv("RAY_SERVE_SESSION_ID_HEADER_KEY", "X_Sticky-Id")
    server = _Server()
    await server.request(kind, headers=[(b"x-sticky_id", b"\xff"), (b"X-Session-Id", b"\xff")])
    assert server.names == {"host", "x-request-id"}


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("offered", [b"\xff", b"", b"a b", b"x" * 65])
async def test_serve_gets_one_request_id_that_is_text(
    server: _Server, kind: str, offered: bytes
) -> None:
    """Serve decodes the id as UTF-8 and would use the second of two."""
    await server.request(kind, headers=[(b"x-request-id", offered), (b"x-request-id", b"\xff")])
    assert server.reached is not None
    [request_id] = [v for k, v in server.reached["headers"] if k == b"x-request-id"]
    assert len(request_id.decode("ascii")) == 32


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("name", [b"traceparent", b"tracestate"])
async def test_a_trace_that_is_no_text_does_not_reach_serve(
    server: _Server, kind: str, name: bytes
) -> None:
    """Serve decodes both as UTF-8 if its own tracing is on."""
    await server.request(kind, headers=[(name, b"\xff"), (b"x-kept", b"1")])
    assert server.names == {"host", "x-kept", "x-request-id"}


async def test_a_trace_of_the_caller_is_passed_on(server: _Server) -> None:
    """Anything that W3C Trace Context allows passes unchanged."""
    trace = [(b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"), (b"tracestate", b"")]
    await server.request("http", headers=trace)
    assert server.reached is not None
    assert set(trace) <= set(server.reached["headers"])


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("path", ["/-/routes", "/-/ROUTES", "/-/routes/", "/-/", "/-/anything"])
async def test_serves_own_paths_are_not_found(server: _Server, kind: str, path: str) -> None:
    """Clients must not learn which applications run."""
    answer = await server.request(kind, path)
    assert server.reached is None
    _assert_not_found(kind, path, answer)


async def test_serves_health_is_for_probes(server: _Server) -> None:
    """KubeRay's operator and HAProxy ask it without a token; it answers with one word."""
    await server.request("http", "/-/healthz")
    assert server.reached is not None
    server.reached = None
    _assert_not_found("websocket", "", await server.request("websocket", "/-/healthz"))


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:8188/ws", "ws://edge.test/", "*", "", "edge.test:80"]
)
async def test_a_websocket_to_something_that_is_no_path_is_refused(
    server: _Server, target: str
) -> None:
    """Serve fails on a websocket whose path matches no route."""
    _assert_not_found("websocket", target, await server.request("websocket", target))
    assert server.reached is None


def _assert_not_found(kind: str, path: str, answer: list[Message]) -> None:
    prefix = "websocket." if kind == "websocket" else ""
    start, body = answer
    assert (start["type"], start["status"]) == (f"{prefix}http.response.start", 404)
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    problem = json.loads(body["body"])
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == problem["request_id"]
    assert {name.lower() for name in SECURITY_HEADERS} <= headers.keys()
    assert (problem["status"], problem["code"]) == (404, "not_found")
    if path:
        assert path.lstrip("/") in problem["instance"]


async def test_no_trailing_slash_is_answered_with_a_redirect() -> None:
    """It would lead to any host that the request names."""
    async with open_site() as site, site.client() as client:
        document = (await client.get("/openapi.json")).json()
        paths = [path.format_map(defaultdict(lambda: str(uuid4()))) for path in document["paths"]]
        for path in [*paths, "/docs", "/openapi.json", "/api", "/nowhere"]:
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
                answer = await client.request(method, f"{path}/", headers={"Host": "evil.test"})
                assert answer.status_code in {404, 405}, path
                assert "location" not in answer.headers
                assert answer.headers["content-type"] == "application/problem+json"
