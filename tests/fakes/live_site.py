"""A site behind a real server: uvicorn on a loopback port, on the test's own event loop.

The blocking client must run in a thread, or it would block the loop that serves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.app import build_asgi_app
from serve_app.client import RestorationClient
from serve_app.local.temporary import free_port
from tests.fakes.site import Site, open_site
from tests.support.polling import until

_T = TypeVar("_T")
CALL_DEADLINE_S = 300


class LiveSite:
    """A site that can be stopped, and started again on the same port."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.app: ASGIApp = build_asgi_app(site.services)
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        config = uvicorn.Config(
            self.app, port=self._port, log_config=None, timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve())
        await until(lambda: self._server.started)

    async def stop(self) -> None:
        self._server.should_exit = True
        await self._serving

    async def call(self, work: Callable[[RestorationClient], _T], **options: Any) -> _T:
        """Run `work` on a client in a thread, because the server runs on this event loop."""

        def run() -> _T:
            with self.client(**options) as client:
                return work(client)

        async with asyncio.timeout(CALL_DEADLINE_S):
            return await asyncio.to_thread(run)

    def client(self, retry_for_s: float = 10.0) -> RestorationClient:
        return RestorationClient(self.url, self.site.token(), retry_for_s=retry_for_s)


@asynccontextmanager
async def open_live_site(**values: object) -> AsyncIterator[LiveSite]:
    async with open_site(**values) as site:
        live = LiveSite(site)
        await live.start()
        try:
            yield live
        finally:
            await live.stop()


class LosesTheFirstAnswer:
    """A proxy that forwards the first POST, drops its answer, and sends 502 after `wait_s`
    seconds."""

    def __init__(self, app: ASGIApp, wait_s: float = 0.0) -> None:
        self._app = app
        self._wait_s = wait_s
        self._lost = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or self._lost:
            return await self._app(scope, receive, send)

        async def drop(_message: Message) -> None:
            self._lost = True

        await self._app(scope, receive, drop)
        await asyncio.sleep(self._wait_s)
        await Response("bad gateway", 502)(scope, receive, send)
