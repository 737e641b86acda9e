"""Answer HEAD on every GET route with its headers, without producing the body. Pure ASGI."""

from __future__ import annotations

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from restoration.tasks import stop

_EXTENSION = "comfy_restore.head_only"


def is_head_only(request: Request) -> bool:
    """Return whether only the headers of the response will be sent."""
    return _EXTENSION in request.scope.get("extensions", {})


class HeadRequests:
    """Middleware that routes HEAD as GET, sends the response's head and cancels the rest.

    It removes the Range header, which RFC 9110 defines for GET only.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)
        # The server goes on with its own scope: it must know that a HEAD has no body.
        extensions = {**scope.get("extensions", {}), _EXTENSION: {}}
        headers = [*scope["headers"]]
        scope = {**scope, "method": "GET", "headers": headers, "extensions": extensions}
        del MutableHeaders(scope=scope)["range"]
        sent = asyncio.Event()

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                sent.set()
            else:
                await asyncio.Event().wait()  # until it is cancelled

        answering = asyncio.ensure_future(self._app(scope, receive, send_head))
        head = asyncio.create_task(sent.wait())
        try:
            await asyncio.wait({answering, head}, return_when=asyncio.FIRST_COMPLETED)
            if not sent.is_set():
                await answering  # it raised
        finally:
            await stop(answering, head)
