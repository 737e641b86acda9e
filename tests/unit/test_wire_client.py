"""No exception of aiohttp leaves the client, however a server breaks a call."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from comfy_pool.protocol.client import ComfyClient
from restoration.errors import EngineFailed, EngineUnavailable

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
NO_TIME_S = 0.2


class Engine:
    """A server that answers each request with `says`, and then closes; silent without."""

    def __init__(self) -> None:
        self.says: bytes | None = OK
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if self.says is None:
            await reader.read()
        else:
            writer.write(self.says)
        writer.close()


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    async with await asyncio.start_server(engine.answer, "127.0.0.1") as server:
        host, port = server.sockets[0].getsockname()
        engine.url = f"http://{host}:{port}"
        yield engine


@asynccontextmanager
async def client_of(url: str, answer_s: float = 60) -> AsyncIterator[ComfyClient]:
    client = ComfyClient(url, answer_s=answer_s)
    yield client
    await client.aclose()


@pytest.mark.parametrize(
    "says",
    [
        None,
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
    ids=["silence", "a hang-up", "half an answer", "no chunk", "no gzip", "no HTTP"],
)
async def test_every_broken_call_is_unavailable(engine: Engine, says: bytes | None) -> None:
    """Every failure on the way is EngineUnavailable, with its cause chained."""
    engine.says = says
    async with client_of(engine.url, NO_TIME_S) as client:
        with pytest.raises(EngineUnavailable) as caught:
            await client.history("p")
        assert isinstance(caught.value.__cause__, aiohttp.ClientError | OSError)
        assert not await client.responds(1.0)


async def test_nobody_listens() -> None:
    """A refused connection is EngineUnavailable."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with client_of(f"http://127.0.0.1:{unused.getsockname()[1]}") as client:
            with pytest.raises(EngineUnavailable):
                await client.history("p")


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, EngineUnavailable), (503, EngineUnavailable), (404, EngineFailed), (302, EngineFailed)],
)
async def test_every_refusal_is_ours(engine: Engine, status: int, error: type[Exception]) -> None:
    """A server's own failure may pass; a refusal will not."""
    engine.says = f"HTTP/1.1 {status} No\r\nLocation: /\r\nContent-Length: 0\r\n\r\n".encode()
    async with client_of(engine.url) as client:
        with pytest.raises(error, match=str(status)):
            await client.forget("p")


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:99999", "http://[half"])
async def test_an_address_that_is_none(url: str) -> None:
    """A setting that is not a URL also raises EngineUnavailable when it is used."""
    async with client_of(url) as client:
        with pytest.raises(EngineUnavailable):
            await client.history("p")


async def test_an_answer_is_recent_until_a_call_fails(engine: Engine) -> None:
    """After a failed call, an earlier answer does not show that the engine is well."""
    async with client_of(engine.url) as client:
        assert not client.responded_within(60)
        await client.forget("p")
        assert client.responded_within(60)
        engine.says = b""
        with pytest.raises(EngineUnavailable):
            await client.forget("p")
        assert not client.responded_within(60)
