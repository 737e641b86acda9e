"""One ComfyUI as the `Engine` port: owned or attached, many runs at once, kept in good health.

All runs share one HTTP client and one websocket, whose events are handed to runs by prompt id.
An engine that ended, hangs, or does not answer while it has nothing to do, is started again before
the next run; so is one that is worn, once it is empty. One that is not ours is only asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self
from uuid import UUID

import structlog

from comfy_pool.limits import EngineLimits
from comfy_pool.process.hosts import EngineHost
from comfy_pool.process.memory import resident_bytes
from comfy_pool.process.restart_backoff import Starts
from comfy_pool.protocol.client import ComfyClient
from comfy_pool.protocol.messages import Executing, Hello, Message, Preview, Started
from comfy_pool.protocol.websocket import EventSocket
from comfy_pool.runs.run import RunInEngine
from comfy_pool.runs.session import EngineSession
from restoration.engine_port import EngineEvent, EngineResult, EngineRun, Pixels, Vram
from restoration.errors import EngineFailed, EngineRejected, EngineUnavailable

log = structlog.get_logger(__name__)


class ComfyEngine:
    """See `restoration.engine_port.Engine`. As an async context manager: started, then closed."""

    def __init__(self, host: EngineHost, limits: EngineLimits | None = None) -> None:
        self._host = host
        self._limits = limits or EngineLimits()
        self._client = ComfyClient(host.base_url, answer_s=self._limits.answer_s)
        self._runs: dict[str, RunInEngine] = {}
        self._tasks: set[asyncio.Task[EngineResult]] = set()  # of the runs in the engine
        self._cleaning: set[asyncio.Task[EngineResult]] = set()  # of those that have their result
        self._link: EngineSession | None = None
        self._starting = asyncio.Lock()
        self._starts = Starts(self._limits)
        self.starts = 0
        self.version = ""  # ComfyUI's, as it said when it was started; empty if it did not
        self._runs_since_start = 0
        self._retired = False
        self._socket: EventSocket | None = None
        self._connecting = asyncio.Lock()
        self._running_id: str | None = None  # as told by the events: the prompt that runs
        self._closed = asyncio.Event()

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

    async def run(self, run: EngineRun, on_event: Callable[[EngineEvent], None]) -> EngineResult:
        """May be called while other runs go on: ComfyUI queues them.

        `on_event` is called on the event loop: it must return at once, and not raise.
        EngineUnavailable never speaks against the run: no engine started, or it was not its turn.
        """
        active = RunInEngine(run, on_event, self._limits)
        if active.id in self._runs:
            raise EngineRejected("a run with this id is already in the engine", run=active.id)
        self._runs[active.id] = active
        try:
            return await self._execute(active, await self._ready())
        finally:
            del self._runs[active.id]
            if self._running_id == active.id:
                self._runs_now("")

    async def interrupt(self, run_id: UUID) -> None:
        """Also while the engine is being started for the run; any other id is ignored."""
        if (active := self._runs.get(str(run_id))) is not None:
            active.ask_to_stop()

    async def healthy(self) -> bool:
        return self.alive and await self._client.responds(self._limits.probe_s)

    async def vram(self) -> Vram | None:
        """Of its GPU, as it says; None without one. Raises EngineUnavailable, EngineFailed."""
        return await self._client.vram()

    @property
    def broken(self) -> EngineUnavailable | None:
        """Why it does not start, once that has failed so often that another start will not help."""
        return self._starts.broken

    @property
    def url(self) -> str:
        return self._host.base_url

    @property
    def alive(self) -> bool:
        """Whether it is there, as far as is known without asking it."""
        return self._link is not None and self._link.alive

    def retire(self) -> None:
        """Have it started anew by the next `start` or run, when none is in it, if it is ours."""
        self._retired = True

    async def node_classes(self) -> frozenset[str]:
        """The classes of all nodes that the engine has. Raises EngineUnavailable."""
        return await self._client.node_classes()

    async def aclose(self) -> None:
        """Stop the runs, each with its own outcome, then the engine if it is ours; repeatable."""
        self._closed.set()
        for active in self._runs.values():
            active.ask_to_stop()
        async with self._starting:
            await self._emptied()
            try:
                await self._stop()
            finally:
                await self._client.aclose()

    async def _execute(self, active: RunInEngine, link: EngineSession) -> EngineResult:
        """In a task of its own, so that a cancelled caller leaves nothing behind in the engine."""
        task = asyncio.create_task(active.execute(link))
        self._tasks.add(task)
        task.add_done_callback(self._cleaning.discard)
        try:
            await asyncio.wait({task, active.result}, return_when=asyncio.FIRST_COMPLETED)
            result = active.result.result() if active.result.done() else task.result()
        except asyncio.CancelledError:
            active.ask_to_stop()
            await _settled(task)
            raise
        finally:
            self._tasks.discard(task)
            if not task.done():
                self._cleaning.add(task)
            self._runs_since_start += 1
        self._starts.run_succeeded()
        return result

    async def _ready(self) -> EngineSession:
        """The link to an engine that lives; starts it if need be. Raises EngineUnavailable."""
        async with self._starting:
            if self._closed.is_set():
                raise EngineUnavailable("the engine is closed")
            link = self._link
            if link is not None and link.alive:
                if wear := await self._wear():
                    log.info("engine_worn", reason=wear, runs=self._runs_since_start)
                    await self._emptied()  # no more runs come: they wait for the lock
                # With runs in it, it is they who notice when it hangs.
                elif self._tasks or await self._answers():
                    return link
            await self._stop()
            self._link = await self._start()
            return self._link

    async def _emptied(self) -> None:
        if leaving := self._tasks | self._cleaning:
            await asyncio.wait(leaving)

    async def _answers(self) -> bool:
        """Whether an engine with nothing to do is well; a probe takes as long as a small job."""
        recently = self._client.responded_within(self._limits.recent_s)
        return recently or await self._client.responds(self._limits.probe_s)

    async def _wear(self) -> str:
        """Why an engine of ours is to be started anew between two runs; empty if it is not."""
        if self._host.pid is None:
            return ""
        if self._retired:
            return "it is to be started anew"
        if not self._runs_since_start:
            return ""
        if 0 < self._limits.restart_after_runs <= self._runs_since_start:
            return "it has had its number of runs"
        if limit := self._limits.memory_limit_bytes:
            resident = await asyncio.to_thread(resident_bytes, self._host.pid)
            if resident > limit:
                return f"its memory has grown to {resident // 1_000_000} MB"
        return ""

    async def _start(self) -> EngineSession:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._starts.pause_s()):
                await self._closed.wait()
        if self._closed.is_set():
            raise EngineUnavailable("the engine is closed")
        try:
            ended = await self._host.start(lambda: self._client.responds(self._limits.probe_s))
        except EngineUnavailable as error:
            self._starts.failed(error)
            raise
        self._starts.succeeded()
        self.starts += 1
        self.version = await self._told_version()
        self._runs_since_start = 0
        self._retired = False
        return EngineSession(self._client, self._host, ended, self._connected)

    async def _told_version(self) -> str:
        """Nothing depends on it: an engine that will not say is no worse."""
        try:
            return await self._client.version()
        except (EngineUnavailable, EngineFailed):
            return ""

    async def _stop(self) -> None:
        self._link = None
        if self._socket is not None:
            await self._socket.aclose()
        await self._host.stop()

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
                self._runs_now(prompt_id)
            case Preview(prompt_id=None):
                prompt_id = self._running_id or ""
            case _:
                prompt_id = message.prompt_id or ""
        if (active := self._runs.get(prompt_id)) is not None:
            active.handle(message)

    def _runs_now(self, prompt_id: str) -> None:
        if prompt_id != self._running_id:
            self._running_id = prompt_id
            active = self._runs.get(prompt_id)
            self._host.executes(active.log_context if active else {})

    def _dropped(self) -> None:
        for active in self._runs.values():
            active.wake()


async def _settled(task: asyncio.Task[EngineResult]) -> None:
    """Wait for the end of `task`, however often that is cancelled; nobody wants its result."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        log.info("cancelled_run_ended", outcome=repr(error))
    elif not task.cancelled() and isinstance(result := task.result(), Pixels):
        await result.discard()
