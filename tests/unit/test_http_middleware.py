"""Request ids, body limits, and corrections of Serve's edge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve_app.asgi.flow_control import FlowControlledEdge
from serve_app.asgi.middleware import BodyPace, ServeEdge, serve_edge
from serve_app.asgi.security_headers import SecurityHeaders
from serve_app.forms.form import FORM_OVERHEAD_BYTES
from tests.fakes.site import API, Site, open_site, submission

LIMIT_BYTES = 1000


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site(upload_max_bytes=LIMIT_BYTES) as site:
        yield site


async def test_a_sane_request_id_is_kept(site: Site) -> None:
    """A client's own id comes back, so it can find its request in the log."""
    async with site.client() as client:
        answer = await client.get("/healthz", headers={"X-Request-Id": "trace-1.a_B"})
    assert answer.headers.get_list("x-request-id") == ["trace-1.a_B"]


@pytest.mark.parametrize("offered", ["", "a b", 'x"y', "x" * 65, "é"])
async def test_any_other_request_id_is_replaced(site: Site, offered: str) -> None:
    """An id that could break or flood a log line is not used."""
    async with site.client() as client:
        headers = {b"X-Request-Id": offered.encode()}
        answer = await client.get("/healthz", headers=headers)
    assert answer.headers["x-request-id"] != offered
    assert len(answer.headers["x-request-id"]) == 32


async def test_a_body_is_refused_while_it_is_read(site: Site) -> None:
    """A body without a length is cut off at the limit: the rest is never requested."""
    chunk, sent = b"x" * FORM_OVERHEAD_BYTES, 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'
        while sent < 100:
            sent += 1
            yield chunk

    async with site.client() as client:
        answer = await client.post(
            API, content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
    assert (answer.status_code, answer.json()["code"]) == (413, "image_too_large")
    assert sent <= 2


@pytest.mark.uploads
async def test_a_body_that_trickles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds an upload's place only for its time limit."""
    monkeypatch.setattr(BodyPace, "PATIENCE_S", 0.5)

    async def trickle() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with asyncio.timeout(300), open_site(max_uploads_in_flight=1) as site:
        async with site.client() as client:
            slow = await client.post(API, content=trickle(), headers=headers)
            next_one = await client.post(API, **submission())
    assert (slow.status_code, slow.json()["code"]) == (408, "upload_too_slow")
    assert next_one.status_code == 202


@pytest.mark.uploads
async def test_a_sender_that_keeps_up_may_take_its_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Received bytes extend the time: a long upload is not a slow one."""
    monkeypatch.setattr(BodyPace, "PATIENCE_S", 2.0)
    monkeypatch.setattr(BodyPace, "SLOWEST_BYTES_S", 1.0)
    request = site.client().build_request("POST", API, **submission())
    body = await request.aread()

    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10):
            yield body[start : start + 10]
            await asyncio.sleep(0.1)

    async with asyncio.timeout(300), site.client() as client:
        answer = await client.post(
            API, content=in_pieces(), headers={"Content-Type": request.headers["content-type"]}
        )
    assert answer.status_code == 202


async def test_a_content_length_that_lies_gains_nothing(site: Site) -> None:
    """Received bytes are counted, regardless of the header."""
    body = submission()
    body["files"]["image"] = ("p", b"\xff\xd8\xff" + bytes(LIMIT_BYTES + FORM_OVERHEAD_BYTES))
    async with site.client() as client:
        answer = await client.post(API, **body, headers={"Content-Length": "10"})
    assert (answer.status_code, answer.json()["code"]) == (413, "image_too_large")


async def test_a_body_that_is_announced_too_large_is_not_read(site: Site) -> None:
    """The refusal comes before the first byte is read."""

    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    headers = {
        "Content-Type": "multipart/form-data; boundary=b",
        "Content-Length": str(LIMIT_BYTES + FORM_OVERHEAD_BYTES + 1),
    }
    async with site.client() as client:
        answer = await client.post(API, content=never(), headers=headers)
    assert answer.status_code == 413


async def test_nobody_is_asked_for_a_body_before_a_token(site: Site) -> None:
    """An upload without a token is refused without reading it."""

    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with site.client(sub=None) as client:
        answer = await client.post(API, content=never(), headers=headers)
    assert answer.status_code == 401


async def test_browsers_of_listed_origins_may_read_the_answers() -> None:
    """CORS_ORIGINS opens the API to these origins only, including errors and our headers."""
    async with open_site(cors_origins=("https://app.test",)) as site, site.client(None) as client:
        ours = await client.get(API, headers={"Origin": "https://app.test"})
        other = await client.get(API, headers={"Origin": "https://evil.test"})
    assert ours.status_code == 401
    assert ours.headers["access-control-allow-origin"] == "https://app.test"
    assert "Location" in ours.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in other.headers


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Add a request id to the answer like Serve, though there is one already."""
    request = Request(scope)
    response = JSONResponse(dict(request.headers))
    for _ in range(2):
        response.headers.append("X-Request-Id", request.headers["x-request-id"])
    await response(scope, receive, send)


async def test_serve_never_sees_a_clients_timeout() -> None:
    """A client cannot use a header to cut or keep requests, its own or others'."""
    transport = httpx.ASGITransport(ServeEdge(_echo))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge.test") as client:
        answer = await client.get(
            "/", headers={"X-Request-Timeout-Seconds": "0.001", "X-Request-Id": "no good"}
        )
    assert "x-request-timeout-seconds" not in answer.json()
    assert answer.headers.get_list("x-request-id") == [answer.json()["x-request-id"]]
    assert answer.json()["x-request-id"] != "no good"


def test_the_edge_is_what_serve_asks_for() -> None:
    """Serve takes a list of Starlette middlewares."""
    middlewares = serve_edge()
    assert all(isinstance(each, Middleware) for each in middlewares)
    factories: list[object] = [each.cls for each in middlewares]
    assert factories == [FlowControlledEdge, ServeEdge, SecurityHeaders]
