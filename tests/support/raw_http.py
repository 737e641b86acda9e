"""HTTP requests as an attacker writes them; httpx would normalise dots and hosts in the target."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage, HTTPResponse
from types import MappingProxyType
from urllib.parse import urlsplit

TIMEOUT_S = 300


@dataclass(frozen=True)
class RawAnswer:
    status: int
    headers: HTTPMessage
    body: bytes


def send_raw(
    url: str,
    method: str,
    target: str,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> RawAnswer:
    """Send a request line with `target` unchanged to the server at `url`, and return its answer."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)) as connection:
        connection.request(method, target, headers=dict(headers))
        answer = connection.getresponse()
        return RawAnswer(answer.status, answer.headers, answer.read())


def send_bytes(url: str, request: bytes) -> RawAnswer:
    """Send `request`, which need not be valid HTTP, and return the answer."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), TIMEOUT_S) as connection:
        connection.sendall(request)
        answer = HTTPResponse(connection)
        answer.begin()
        return RawAnswer(answer.status, answer.headers, answer.read())
