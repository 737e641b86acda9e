"""The edge middleware in uvicorn, as Serve runs it, with raw requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.types import ASGIApp

from serve_app.app import build_asgi_app
from serve_app.asgi.middleware import serve_edge
from serve_app.asgi.security_headers import SECURITY_HEADERS
from serve_app.local.temporary import free_port
from tests.fakes.site import open_site
from tests.support.polling import until
from tests.support.raw_http import RawAnswer, send_bytes

UPGRADE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with open_site() as site:
        app: ASGIApp = build_asgi_app(site.services)
        for middleware in serve_edge():
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        port = free_port()
        config = uvicorn.Config(app, port=port, lifespan="off", log_config=None, access_log=False)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        await serving


async def _send(url: str, request_line: bytes, *headers: bytes) -> RawAnswer:
    request = b"\r\n".join([request_line, b"Host: edge.test", *headers, b"", b""])
    return await asyncio.to_thread(send_bytes, url, request)


@pytest.mark.parametrize(
    "target",
    [b"http://127.0.0.1:8188/ws", b"ws://edge.test/", b"http://edge.test", b"*", b"/-/routes"],
)
async def test_a_websocket_to_no_path_is_answered_with_a_problem(url: str, target: bytes) -> None:
    """uvicorn passes a websocket's target on unchanged."""
    answer = await _send(url, b"GET " + target + b" HTTP/1.1", UPGRADE)
    assert answer.status == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.body)["code"] == "not_found"
    assert {name for name in SECURITY_HEADERS if name not in answer.headers} == set()


async def test_a_websocket_to_a_path_is_refused_by_the_application(url: str) -> None:
    """The application has no websocket routes, and the edge leaves the refusal to it."""
    answer = await _send(url, b"GET /api/v1/ws HTTP/1.1", UPGRADE)
    assert 400 <= answer.status < 500


@pytest.mark.parametrize(
    "line",
    [
        b"serve_multiplexed_model_id: \xff",
        b"X-Session-Id: \xff",
        b"x_session_id: \xff",
        b"x-request-id: \xff",
        b"traceparent: \xff",
        b"cookie: \xff",
    ],
)
async def test_bytes_that_are_no_text_do_no_harm(url: str, line: bytes) -> None:
    """Undecodable header bytes harm neither requests nor websocket upgrades."""
    assert (await _send(url, b"GET /healthz HTTP/1.1", line, b"Connection: close")).status == 200
    upgraded = await _send(url, b"GET http://edge.test/ws HTTP/1.1", line, UPGRADE)
    assert upgraded.status == 404
