"""One ComfyUI as the `Engine` port: owned or attached, many runs at once, started anew when dead.

All runs share one HTTP client and one websocket, whose events are handed to runs by prompt id.
An engine that ended, or that does not answer while it has nothing to do, is started again before
the next run; one that is not ours is only asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self
from uuid import UUID

import structlog

from comfy_pool.client import ComfyClient
from comfy_pool.event_socket import EventSocket
from comfy_pool.hosts import EngineHost
from comfy_pool.run import EngineLimits, Link, RunInEngine
from comfy_pool.wire import Executing, Hello, Message, Preview, Started
from restoration.errors import EngineRejected, EngineUnavailable
from restoration.ports import EngineEvent, EngineRun

_log = structlog.get_logger(__name__)


class ComfyEngine:
    """See `restoration.ports.Engine`. As an async context manager: started, then closed."""

    def __init__(self, host: EngineHost, limits: EngineLimits | None = None) -> None:
        self._host = host
        self._limits = limits or EngineLimits()
        self._client = ComfyClient(host.base_url, answer_s=self._limits.answer_s)
        self._runs: dict[str, RunInEngine] = {}
        self._tasks: set[asyncio.Task[bytes]] = set()
        self._link: Link | None = None
        self._starting = asyncio.Lock()
        self._socket: EventSocket | None = None
        self._connecting = asyncio.Lock()
        self._running_id: str | None = None  # as told by the events: the prompt that runs
        self._closed = False

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        await self._ready()

    async def run(self, run: EngineRun, on_event: Callable[[EngineEvent], None]) -> bytes:
        """May be called while other runs go on: ComfyUI queues them.

        `on_event` is called on the event loop: it must return at once, and not raise.
        """
        active = RunInEngine(run, on_event)
        if active.id in self._runs:
            raise EngineRejected("a run with this id is already in the engine", run=active.id)
        self._runs[active.id] = active
        try:
            return await self._execute(active, await self._ready())
        finally:
            del self._runs[active.id]

    async def interrupt(self, run_id: UUID) -> None:
        """Also while the engine is being started for the run; any other id is ignored."""
        if (active := self._runs.get(str(run_id))) is not None:
            active.ask_to_stop()

    async def healthy(self) -> bool:
        alive = self._link is not None and not self._link.ended.done()
        return alive and await self._client.responds(self._limits.probe_s)

    async def node_classes(self) -> frozenset[str]:
        """The classes of all nodes that the engine has. Raises EngineUnavailable."""
        return await self._client.node_classes()

    async def aclose(self) -> None:
        """Stop the runs, each with its own outcome, then the engine if it is ours; repeatable."""
        self._closed = True
        for active in self._runs.values():
            active.ask_to_stop()
        async with self._starting:
            if self._tasks:
                await asyncio.wait(self._tasks)
            try:
                await self._stop()
            finally:
                await self._client.aclose()

    async def _execute(self, active: RunInEngine, link: Link) -> bytes:
        """In a task of its own, so that a cancelled caller leaves nothing behind in the engine."""
        task = asyncio.create_task(active.execute(link))
        self._tasks.add(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            active.ask_to_stop()
            await _settled(task)
            raise
        finally:
            self._tasks.discard(task)

    async def _ready(self) -> Link:
        """The link to an engine that lives; starts it if need be. Raises EngineUnavailable."""
        async with self._starting:
            if self._closed:
                raise EngineUnavailable("the engine is closed")
            if self._link is None or not await self._usable(self._link):
                await self._stop()
                self._link = await self._start()
            return self._link

    async def _usable(self, link: Link) -> bool:
        if link.ended.done():
            return False
        # Runs notice by themselves when it hangs.
        return bool(self._tasks) or await self._client.responds(self._limits.probe_s)

    async def _start(self) -> Link:
        await self._host.start(lambda: self._client.responds(self._limits.probe_s))
        ended = asyncio.create_task(self._host.ended())
        return Link(self._client, self._host, ended, self._connected, self._limits)

    async def _stop(self) -> None:
        link, self._link = self._link, None
        if self._socket is not None:
            await self._socket.aclose()
        try:
            await self._host.stop()
        finally:
            if link is not None:
                link.ended.cancel()
                await asyncio.wait({link.ended})

    async def _connected(self) -> EventSocket:
        """The live websocket, opened under a new client id if the last one was dropped."""
        async with self._connecting:
            if self._socket is None or self._socket.closed:
                self._socket = await self._client.connect(self._dispatch, self._dropped)
            return self._socket

    def _dispatch(self, message: Message) -> None:
        match message:
            case Hello():
                return
            case Started(prompt_id=prompt_id) | Executing(prompt_id=prompt_id):
                self._running_id = prompt_id
            case Preview(prompt_id=None):
                prompt_id = self._running_id or ""
            case _:
                prompt_id = message.prompt_id or ""
        if (active := self._runs.get(prompt_id)) is not None:
            active.handle(message)

    def _dropped(self) -> None:
        for active in self._runs.values():
            active.wake()


async def _settled(task: asyncio.Task[bytes]) -> None:
    """Wait for the end of `task`, however often the waiting is cancelled."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.info("run ended after it was cancelled", outcome=repr(error))
