"""Requests as an attacker writes them: httpx takes dots out of a path, and a host off its front."""

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
    """The answer of the server at `url` to a request line that has `target` letter by letter."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)) as connection:
        connection.request(method, target, headers=dict(headers))
        answer = connection.getresponse()
        return RawAnswer(answer.status, answer.headers, answer.read())


def send_bytes(url: str, request: bytes) -> RawAnswer:
    """The answer to a whole request that may be none of HTTP."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), TIMEOUT_S) as connection:
        connection.sendall(request)
        answer = HTTPResponse(connection)
        answer.begin()
        return RawAnswer(answer.status, answer.headers, answer.read())
