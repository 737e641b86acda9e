"""A site behind a real server: uvicorn on a port of loopback, on the test's own event loop.

The blocking client has to be called from a thread, or it would wait for a server that waits.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from serve_app.app import build_asgi_app
from serve_app.client import RestorationClient
from tests.fakes.site import Site, open_site

START_DEADLINE_S = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LiveSite:
    """Can be stopped and started again on its port, as a service is under its clients."""

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
        async with asyncio.timeout(START_DEADLINE_S):
            while not self._server.started:  # noqa: ASYNC110 # uvicorn offers nothing to wait for
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._server.should_exit = True
        await self._serving

    def client(self, patience_s: float = 10.0) -> RestorationClient:
        return RestorationClient(self.url, self.site.token(), patience_s=patience_s)


@asynccontextmanager
async def open_live_site(**values: object) -> AsyncIterator[LiveSite]:
    async with open_site(**values) as site:
        live = LiveSite(site)
        await live.start()
        try:
            yield live
        finally:
            await live.stop()
