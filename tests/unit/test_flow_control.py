"""Back-pressure between an HTTP server and an application joined by unbounded queues, like Ray
Serve's proxy and its replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.asgi.flow_control import (
    ACKNOWLEDGED_EVERY_BYTES,
    EXTENSION,
    WINDOW_BYTES,
    FlowControlledApp,
    FlowControlledEdge,
)
from tests.support.polling import until

PIECE = 64 * 1024
DEADLINE_S = 20
SETTLED_TURNS = 200  # turns of the event loop, in which all pending work finishes


class Serve:
    """A server and an app joined as in `ray.serve`: every message is accepted at once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.requests: asyncio.Queue[Message] = asyncio.Queue()
        self.answers: asyncio.Queue[Message] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taking_in = asyncio.create_task(self._take_in(receive))
        running: asyncio.Task[None] = asyncio.ensure_future(
            self._app(scope, self.requests.get, self.answers.put)
        )
        running.add_done_callback(lambda _: self.answers.put_nowait({"type": "ended"}))
        try:
            while (message := await self.answers.get())["type"] != "ended":
                await send(message)
        finally:
            taking_in.cancel()
            running.cancel()

    async def _take_in(self, receive: Receive) -> None:
        while True:
            self.requests.put_nowait(await receive())

    @property
    def request_bytes(self) -> int:
        return _bytes_in(self.requests)

    @property
    def answer_bytes(self) -> int:
        return _bytes_in(self.answers)


def _bytes_in(queue: asyncio.Queue[Message]) -> int:
    waiting: list[Message] = list(queue._queue)  # type: ignore[attr-defined]
    return sum(len(message.get("body", b"")) for message in waiting)


class Client:
    """A client as the server presents it: an endless body, read as fast as requested."""

    def __init__(self, pieces: int | None = None) -> None:
        self._left = pieces
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.sent = 0
        self.received: list[Message] = []

    async def receive(self) -> Message:
        await asyncio.sleep(0)
        if self.gone.is_set() or self._left == 0:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        self._left = None if self._left is None else self._left - 1
        self.sent += PIECE
        return {"type": "http.request", "body": bytes(PIECE), "more_body": self._left != 0}

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        self.received.append(message)

    @property
    def received_bytes(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.received)


@asynccontextmanager
async def exchange(app: ASGIApp, client: Client) -> AsyncIterator[Serve]:
    """Run the app under Serve for the client."""
    serve = Serve(FlowControlledApp(app))
    scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": []}
    running = asyncio.create_task(FlowControlledEdge(serve)(scope, client.receive, client.send))
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield serve
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def settle() -> None:
    for _ in range(SETTLED_TURNS):
        await asyncio.sleep(0)


async def test_a_request_that_is_not_read_stops_at_the_window() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await asyncio.Event().wait()

    client = Client()
    async with exchange(app, client) as serve:
        await until(lambda: client.sent >= WINDOW_BYTES)
        await settle()
        assert serve.request_bytes <= client.sent <= WINDOW_BYTES + PIECE


async def test_a_request_that_is_read_slowly_is_taken_in_no_faster() -> None:
    taken, ahead = 0, 0
    finished = asyncio.Event()

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        nonlocal taken, ahead
        for _ in range(100):
            taken += len((await receive())["body"])
            await asyncio.sleep(0)
            ahead = max(ahead, client.sent - taken)
        finished.set()

    client = Client()
    async with exchange(app, client):
        await finished.wait()
    assert taken == 100 * PIECE
    assert ahead <= WINDOW_BYTES + ACKNOWLEDGED_EVERY_BYTES + PIECE


async def test_an_answer_that_is_not_read_stops_at_the_window() -> None:
    written = 0

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        nonlocal written
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": True})
            written += PIECE

    client = Client(pieces=1)
    client.reads.clear()
    async with exchange(app, client) as serve:
        await until(lambda: written >= WINDOW_BYTES)
        await settle()
        assert serve.answer_bytes <= written <= WINDOW_BYTES + PIECE
        client.reads.set()
        await until(lambda: client.received_bytes >= 4 * WINDOW_BYTES)


async def test_both_bodies_arrive_whole_and_acknowledgements_nowhere() -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        assert EXTENSION in scope["extensions"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            message = await receive()
            assert message["type"] == "http.request"
            more = message["more_body"]
            await send({"type": "http.response.body", "body": message["body"], "more_body": more})
            if not more:
                break

    pieces = 3 * WINDOW_BYTES // PIECE
    client = Client(pieces)
    async with exchange(echo, client):
        await until(lambda: client.received_bytes >= pieces * PIECE)
    assert client.received_bytes == pieces * PIECE
    kinds = {message["type"] for message in client.received}
    assert kinds == {"http.response.start", "http.response.body"}


@pytest.mark.parametrize("waits_in", ["receive", "send"])
async def test_a_client_that_goes_ends_what_waits_for_it(waits_in: str) -> None:
    ended = asyncio.Event()

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if waits_in == "receive":
            assert (await receive())["type"] == "http.disconnect"
        else:
            for _ in range(2 * WINDOW_BYTES // PIECE):
                await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": True})
        assert (await receive())["type"] == "http.disconnect"  # and again, as ASGI allows
        ended.set()

    client = Client(pieces=1)
    client.reads.clear()
    async with exchange(app, client):
        await settle()
        assert not ended.is_set()
        client.gone.set()
        await ended.wait()


async def test_without_the_edge_the_application_talks_to_its_server() -> None:
    scope: dict[str, Any] = {"type": "http"}
    client = Client()
    found: list[object] = []

    async def app(*of_server: object) -> None:
        found.extend(of_server)

    await FlowControlledApp(app)(scope, client.receive, client.send)
    assert found == [scope, client.receive, client.send]
