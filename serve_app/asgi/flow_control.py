"""Flow control through Ray Serve, for request and response bodies. Pure ASGI.

Serve's proxy reads a request as fast as the client sends it, and a response as fast as the
application writes it. It queues both without a limit, in the proxy and in the replica
(`MessageQueue` and `ASGIReceiveProxy` in ray.serve._private.http_util, 2.60; behind HAProxy
`ASGIDIReceiveProxy`). A middleware at each end therefore counts the bytes in between: the sender
stops `WINDOW_BYTES` ahead of the receiver, which acknowledges the bytes it has consumed.

Acknowledgements are ASGI messages in the opposite direction, which Serve passes on unchanged: those
for the request body travel in the response stream, those for the response body in the request
stream. Neither reaches the server or the application. Without the middleware at the edge, as under
plain uvicorn, the one at the application does nothing.
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
    """The end at the HTTP server, installed by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

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
    """The end at the application, as its outermost middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if EXTENSION not in scope.get("extensions", {}):
            return await self._app(scope, receive, send)
        exchange = _AppExchange(receive, send)
        await self._app(scope, exchange.receive, exchange.send)


class _Acknowledgements:
    """The receiver's count of bytes consumed and not acknowledged yet."""

    def __init__(self) -> None:
        self._taken = 0

    def take(self, message: Message) -> Message | None:
        """Count a message, and return the acknowledgement to send now, if one is due."""
        self._taken += len(message.get("body", b""))
        if self._taken < ACKNOWLEDGED_EVERY_BYTES:
            return None
        acknowledgement = {"type": _ACKNOWLEDGED, "bytes": self._taken}
        self._taken = 0
        return acknowledgement


class _Window:
    """The sender's count of bytes sent and not acknowledged yet."""

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
    """One request at the edge. One task calls `receive` and another calls `send`."""

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
        """Return the client's next message, or None if an event for `receive` comes first."""
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
        if (acknowledgement := self._answer.take(message)) is not None:
            self._due.append(acknowledgement)
            self._news.set()

    async def aclose(self) -> None:
        if self._reading is not None:
            await stop(self._reading)


class _AppExchange:
    """One request at the application.

    `receive` and `send` may wait for a message at the same time; one of them reads it for both.
    """

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
        if (acknowledgement := self._request.take(message)) is not None:
            await self._send(acknowledgement)
        return message

    async def send(self, message: Message) -> None:
        """Send `message`, or drop it after a disconnect, when no acknowledgement would follow."""
        await self._read_until(lambda: self._disconnected or self._answer.is_open)
        if not self._disconnected:
            self._answer.add(message)
            await self._send(message)

    async def _read_until(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            async with self._reading:
                if is_enough():  # another task has read it meanwhile
                    return
                message = await self._receive()
                if message["type"] == _ACKNOWLEDGED:
                    self._answer.acknowledge(message)
                elif message["type"] == _DISCONNECTED:
                    self._disconnected = True
                else:
                    self._arrived.append(message)
