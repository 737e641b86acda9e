"""Requests that target Ray Serve instead of the service, or that target nothing.

The tests hold for Serve's own HTTP proxy and for HAProxy, and `make test` runs them with both.
"""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest

from serve_app.asgi.security_headers import SECURITY_HEADERS
from tests.support.raw_http import RawAnswer, send_bytes, send_raw
from tests.support.stack import Stack

API = "/api/v1/restorations"
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
STEERING = (
    *("serve_multiplexed_model_id", "serve-multiplexed-model-id", "Serve-Multiplexed_Model-Id"),
    *("x-session-id", "x_session_id", "X-SESSION_ID"),
    *("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-request-id"),
    *("x-serve-router-target", "traceparent", "tracestate"),
)
READ_BY_US = (
    *("authorization", "idempotency-key", "prefer", "accept", "content-type", "cookie", "range"),
    *("last-event-id", "origin", "user-agent", "forwarded", "x-forwarded-for", "x-forwarded-proto"),
)
VALUES = ("\xff", "?1", "0.001", "")


def _user(stack: Stack) -> dict[str, str]:
    return {"Authorization": f"Bearer {stack.token()}"}


def _assert_problem(answer: RawAnswer, status: int) -> None:
    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.body)["status"] == status
    assert {name for name in SECURITY_HEADERS if name not in answer.headers} == set()


@pytest.mark.parametrize("name", STEERING)
def test_a_header_for_serve_changes_nothing(stack: Stack, name: str) -> None:
    """For any value, the answer is that of a request without the header."""
    url = stack.record.url
    for value in VALUES:
        headers = _user(stack) | {name: value}
        assert send_raw(url, "GET", "/healthz", headers).status == 200
        assert send_raw(url, "GET", API, headers).status == 200
        _assert_problem(send_raw(url, "GET", f"{API}/nonsense", headers), 422)
        assert 400 <= send_raw(url, "GET", "/ws", headers | UPGRADE).status < 500


@pytest.mark.parametrize("name", READ_BY_US)
def test_a_header_that_is_no_text_is_no_fault_of_the_service(stack: Stack, name: str) -> None:
    """Headers that the service reads may have bytes that are not UTF-8."""
    url = stack.record.url
    for value in ("\xff", "\xff\xfe=\xff;q=\xff", "Bearer \xff.\xff.\xff"):
        headers = _user(stack) | {name.title(): value}
        for method, path in (("GET", API), ("POST", API), ("POST", f"{API}/nonsense/cancel")):
            assert send_raw(url, method, path, headers).status < 500, value


@pytest.mark.parametrize("target", ["http://{host}/prompt", "ws://{host}/ws", "http://evil.test/",
                                    "//evil.test/ws", "/-/routes", "*"])  # fmt: skip
def test_a_websocket_to_no_route_is_refused(stack: Stack, target: str) -> None:
    """The target may be an absolute URL too, on which Serve itself fails."""
    url = stack.record.url
    headers = _user(stack) | UPGRADE
    answer = send_raw(url, "GET", target.format(host=urlsplit(url).netloc), headers)
    assert 400 <= answer.status < 500


@pytest.mark.parametrize("path", ["/-/routes", "/-/routes?a=b", "/-/routes/", "/%2d/routes"])
def test_nobody_learns_which_applications_run(stack: Stack, path: str) -> None:
    """The routes are hidden with a token and without one."""
    for headers in ({}, _user(stack)):
        _assert_problem(send_raw(stack.record.url, "GET", path, headers), 404)


def test_serves_health_says_one_word(stack: Stack) -> None:
    """The endpoint is for probes without a token, such as KubeRay's."""
    answer = send_raw(stack.record.url, "GET", "/-/healthz")
    assert (answer.status, answer.body) == (200, b"success")


@pytest.mark.parametrize("path", [API, "/api/v1/workflows", "/healthz", "/docs", "/openapi.json"])
def test_a_trailing_slash_leads_nowhere(stack: Stack, path: str) -> None:
    """A redirect would lead to any host that the request names."""
    headers = _user(stack) | {"Host": "evil.test"}
    answer = send_raw(stack.record.url, "GET", f"{path}/", headers)
    _assert_problem(answer, 404)
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /\xff HTTP/1.1",
        b"GET /%ff HTTP/1.1",
        b"GET /%ed%a0%80 HTTP/1.1",
        b"GET /api/v1/restorations/%00 HTTP/1.1",
        b"GET /api/v1/restorations?cursor=%ff HTTP/1.1",
        b"GET /api/v1/restorations?\xff=\xff HTTP/1.1",
        b"GET  HTTP/1.1",
        b"GET nowhere HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"CONNECT evil.test:443 HTTP/1.1",
        b"BREW / HTTP/1.1",
        b"G\xffT / HTTP/1.1",
        b"GET / HTTP/9.9",
        b"\xff\xff\xff",
    ],
)
def test_a_request_line_of_odd_bytes_is_the_senders_fault(
    stack: Stack, request_line: bytes
) -> None:
    """The first server that cannot read it answers with a 4xx."""
    token = f"Authorization: Bearer {stack.token()}".encode()
    request = b"\r\n".join(
        [request_line, b"Host: edge.test", token, b"Connection: close", b"", b""]
    )
    assert 400 <= send_bytes(stack.record.url, request).status < 500


@pytest.mark.parametrize("line", [b"X-\xff: 1", b"Host: [", b"Host: \xff", b"Host: a b", b": 1"])
def test_a_header_of_odd_bytes_is_no_fault_of_the_service(stack: Stack, line: bytes) -> None:
    """The odd bytes are in a header's name, or in the Host header."""
    for path in (b"/healthz", b"/api/v1/restorations/", b"/nowhere"):
        request = b"GET " + path + b" HTTP/1.1\r\n" + line + b"\r\nConnection: close\r\n\r\n"
        assert send_bytes(stack.record.url, request).status < 500
