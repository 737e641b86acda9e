"""Many readers of one event stream that only record bytes and times, to be decoded afterwards.

They share the cores with the service, so a reader that decoded during the measurement would mostly
measure itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from serve_app.sse import Decoder, ServerEvent

AT_A_TIME = 100  # concurrent connection attempts


class Reader(asyncio.Protocol):
    """One client. `pieces` holds the received bytes with the monotonic times of their arrival."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.answered = asyncio.Event()
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        self.answered.set()

    def connection_lost(self, _: Exception | None) -> None:
        self.answered.set()
        self.ended.set()


async def watch(url: str, token: str, clients: int) -> tuple[list[Reader], float]:
    """Return the readers after the end of the stream, and when the last one's answer began."""
    address = urlsplit(url)
    assert address.hostname
    assert address.port
    host, port = address.hostname, address.port
    lines = (
        f"GET {address.path} HTTP/1.1",
        f"Host: {address.netloc}",
        f"Authorization: Bearer {token}",
        *("Connection: close", "", ""),
    )
    request, room = "\r\n".join(lines).encode(), asyncio.Semaphore(AT_A_TIME)

    async def open_one() -> Reader:
        async with room:
            loop = asyncio.get_running_loop()
            _, reader = await loop.create_connection(lambda: Reader(request), host, port)
            await reader.answered.wait()
            return reader

    readers = await asyncio.gather(*(open_one() for _ in range(clients)))
    open_at = time.monotonic()
    await asyncio.gather(*(reader.ended.wait() for reader in readers))
    return readers, open_at


def events(reader: Reader) -> Iterator[tuple[float, ServerEvent]]:
    """Yield each event with the arrival time of its last byte."""
    decoder, rest, head = Decoder(), b"", True
    for at, data in reader.pieces:
        rest += data
        if head:
            status, ended, after = rest.partition(b"\r\n\r\n")
            if not ended:
                continue
            assert status.startswith(b"HTTP/1.1 200"), status
            head, rest = False, after
        chunks, rest = _chunks(rest)
        for event in decoder.feed(chunks.decode()):
            yield at, event


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    """Return the content of the complete chunks, and the remaining data (RFC 9112, 7.1)."""
    whole = b""
    while b"\r\n" in data:
        size, _, after = data.partition(b"\r\n")
        length = int(size, 16)
        if len(after) < length + 2:
            break
        whole, data = whole + after[:length], after[length + 2 :]
    return whole, data
