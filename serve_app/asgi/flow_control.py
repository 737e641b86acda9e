"""Back-pressure through Ray Serve, for the bodies of requests and of answers. Pure ASGI.

Serve's proxy takes in a request as fast as the client sends it, and an answer as fast as the
application writes it, and queues both without a limit in the proxy and in the replica
(`MessageQueue` and `ASGIReceiveProxy` in ray.serve._private.http_util, 2.60; behind HAProxy
`ASGIDIReceiveProxy`). So each end has a middleware of ours, and these two count the bytes between
them: a sender stops `WINDOW_BYTES` ahead of its receiver, which acknowledges what it has taken.

The acknowledgements travel as ASGI messages in the other direction, which Serve passes on as they
are: those for the request's body in the stream of the answer, those for the answer's body in the
stream of the request. Neither reaches the server or the application. An application without the
edge around it, as under plain uvicorn, talks to the server itself and needs none of this.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from restoration.tasks import stop

WINDOW_BYTES = 1024 * 1024
# At most the window, or both ends would wait for each other.
ACKNOWLEDGED_EVERY_BYTES = WINDOW_BYTES // 4

EXTENSION = "comfy_restore.flow_control"
_ACKNOWLEDGED = f"{EXTENSION}.acknowledged"
_DISCONNECTED = "http.disconnect"


class FlowControlledEdge:
    """The end at the HTTP server: for RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope.setdefault("extensions", {})[EXTENSION] = {}
        exchange = _EdgeExchange(receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            await exchange.aclose()


class FlowControlledApp:
    """The end at the application, whose outermost middleware it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if EXTENSION not in scope.get("extensions", {}):
            return await self._app(scope, receive, send)
        exchange = _AppExchange(receive, send)
        await self._app(scope, exchange.receive, exchange.send)


class _Acknowledgements:
    """Bytes that were taken and not acknowledged yet, at the end that takes them."""

    def __init__(self) -> None:
        self._taken = 0

    def take(self, message: Message) -> None:
        self._taken += len(message.get("body", b""))

    def due(self) -> Message | None:
        """The acknowledgement to send now, if enough has been taken."""
        if self._taken < ACKNOWLEDGED_EVERY_BYTES:
            return None
        message = {"type": _ACKNOWLEDGED, "bytes": self._taken}
        self._taken = 0
        return message


class _Window:
    """Bytes on their way to the other end, at the end that sends them."""

    def __init__(self) -> None:
        self._on_the_way = 0

    @property
    def is_open(self) -> bool:
        return self._on_the_way < WINDOW_BYTES

    def add(self, message: Message) -> None:
        self._on_the_way += len(message.get("body", b""))

    def acknowledge(self, message: Message) -> None:
        self._on_the_way -= message["bytes"]


class _EdgeExchange:
    """One request at the edge. `receive` is called by one task and `send` by another."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._request = _Window()
        self._answer = _Acknowledgements()
        self._due: deque[Message] = deque()
        self._news = asyncio.Event()
        self._reading: asyncio.Task[Message] | None = None

    async def receive(self) -> Message:
        while True:
            if self._due:
                return self._due.popleft()
            self._news.clear()
            if not self._request.is_open:
                await self._news.wait()
            elif (message := await self._read()) is not None:
                self._request.add(message)
                return message

    async def _read(self) -> Message | None:
        """The client's next message; None if there is news before it."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._receive())
        news = asyncio.create_task(self._news.wait())
        try:
            await asyncio.wait({self._reading, news}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        if not self._reading.done():
            return None
        message, self._reading = self._reading.result(), None
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == _ACKNOWLEDGED:
            self._request.acknowledge(message)
            self._news.set()
            return
        await self._send(message)
        self._answer.take(message)
        if (acknowledgement := self._answer.due()) is not None:
            self._due.append(acknowledgement)
            self._news.set()

    async def aclose(self) -> None:
        if self._reading is not None:
            await stop(self._reading)


class _AppExchange:
    """One request at the application. Either method may wait for a message; one of them reads."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._answer = _Window()
        self._request = _Acknowledgements()
        self._arrived: deque[Message] = deque()
        self._reading = asyncio.Lock()
        self._disconnected = False

    async def receive(self) -> Message:
        await self._read_until(lambda: self._disconnected or bool(self._arrived))
        if not self._arrived:
            return {"type": _DISCONNECTED}
        message = self._arrived.popleft()
        self._request.take(message)
        if (acknowledgement := self._request.due()) is not None:
            await self._send(acknowledgement)
        return message

    async def send(self, message: Message) -> None:
        """Does nothing once the client has gone: no acknowledgement would follow."""
        await self._read_until(lambda: self._disconnected or self._answer.is_open)
        if not self._disconnected:
            self._answer.add(message)
            await self._send(message)

    async def _read_until(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            async with self._reading:
                if is_enough():  # another caller has read it meanwhile
                    return
                message = await self._receive()
                if message["type"] == _ACKNOWLEDGED:
                    self._answer.acknowledge(message)
                elif message["type"] == _DISCONNECTED:
                    self._disconnected = True
                else:
                    self._arrived.append(message)
