"""A real HTTP server that receives webhooks and answers as a test scripts it.

`verify` is a second implementation of Standard Webhooks, written from the specification alone.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Seen:
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


def verify(secret: str, headers: Mapping[str, str], body: bytes, tolerance_s: float = 300) -> bool:
    """Return whether one of the signatures is right and the time stamp is recent."""
    if abs(time.time() - int(headers["webhook-timestamp"])) > tolerance_s:
        return False
    hashed = hmac.new(base64.b64decode(secret.split("_", 1)[1]), digestmod=hashlib.sha256)
    for part in (headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body):
        hashed.update(part + (b"" if part is body else b"."))
    expected = base64.b64encode(hashed.digest())
    signatures = [each.partition(",") for each in headers["webhook-signature"].split(" ")]
    return any(
        version == "v1" and hmac.compare_digest(signature.encode(), expected)
        for version, _, signature in signatures
    )


def status(code: int, **headers: str) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head = "\r\n".join([f"HTTP/1.1 {code} Whatever", *lines, "Content-Length: 0", "", ""])
        writer.write(head.encode())

    return answer


async def silence(_writer: asyncio.StreamWriter) -> None:
    """Hold the connection open without an answer."""
    await asyncio.Event().wait()


async def drip(writer: asyncio.StreamWriter) -> None:
    """Send header after header endlessly, so that no read times out."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def flood(writer: asyncio.StreamWriter) -> None:
    """Answer 200 with an endless body."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(bytes(16 * 1024))
        await writer.drain()


@dataclass
class Receiver:
    """Answers with `script`, in order, and then with `default` (204). `seen` holds every
    request."""

    port: int = 0
    script: list[Answer] = field(default_factory=list)
    default: Answer = field(default_factory=lambda: status(204))
    seen: list[Seen] = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    def url(self, host: str = "127.0.0.1", path: str = "/hook?token=1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def wait_for(self, count: int) -> None:
        """Return when `count` requests have arrived."""
        async with asyncio.timeout(300), self.arrived:
            await self.arrived.wait_for(lambda: len(self.seen) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request, *lines = head.rstrip().split("\r\n")
                pairs = (line.partition(": ") for line in lines)
                headers = {name.lower(): value for name, _, value in pairs}
                body = await reader.readexactly(int(headers["content-length"]))
                answer = self.script.pop(0) if self.script else self.default
                async with self.arrived:
                    self.seen.append(Seen(request.split(" ")[1], headers, body))
                    self.arrived.notify_all()
                await answer(writer)
                await writer.drain()


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver, connections = Receiver(), set[asyncio.Task[Any]]()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await receiver._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the end of the test
        finally:
            connections.discard(task)
            writer.close()

    server = await asyncio.start_server(connected, "localhost", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
