"""Implement the `Engine` port with one ComfyUI, owned or attached.

Runs may overlap. They share one HTTP client and one websocket; events are dispatched by prompt id.
Before the next run, an owned engine is restarted if it has exited, hangs, or fails a probe while
idle. It is also restarted, once no run is in it, on request, after its number of runs, or if it
exceeds its memory limit. An attached engine is only probed again.
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
from comfy_pool.process.restart_backoff import RestartBackoff
from comfy_pool.protocol.client import ComfyClient
from comfy_pool.protocol.messages import Executing, Hello, Message, Preview, Started
from comfy_pool.protocol.websocket import EventSocket
from comfy_pool.runs.run import RunInEngine
from comfy_pool.runs.session import EngineSession
from restoration.engine_port import EngineEvent, EngineResult, EngineRun, Pixels, Vram
from restoration.errors import EngineFailed, EngineRejected, EngineUnavailable

log = structlog.get_logger(__name__)


class ComfyEngine:
    """A ComfyUI engine that implements `restoration.engine_port.Engine`.

    Entering the async context starts the engine; leaving it closes the engine.
    """

    def __init__(self, host: EngineHost, limits: EngineLimits | None = None) -> None:
        self._host = host
        self._limits = limits or EngineLimits()
        self._client = ComfyClient(host.base_url, answer_s=self._limits.answer_s)
        self._runs: dict[str, RunInEngine] = {}
        self._tasks: set[asyncio.Task[EngineResult]] = set()  # runs without a result yet
        self._cleaning: set[asyncio.Task[EngineResult]] = set()  # runs with a result
        self._session: EngineSession | None = None
        self._starting = asyncio.Lock()
        self._starts = RestartBackoff(self._limits)
        self.starts = 0
        self.version = ""  # ComfyUI's version, read at each start; empty if it was not reported
        self._runs_since_start = 0
        self._restart_due = False
        self._socket: EventSocket | None = None
        self._connecting = asyncio.Lock()
        self._running_id: str | None = None  # the executing prompt, according to events
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
        """Start the engine unless it runs already. Raises EngineUnavailable."""
        await self._ready()

    async def run(self, run: EngineRun, on_event: Callable[[EngineEvent], None]) -> EngineResult:
        """Run a prompt and return its picture. Concurrent calls are allowed: ComfyUI queues them.

        `on_event` is called on the event loop; it must not block or raise. EngineUnavailable never
        blames the run: the engine did not start, or ended while another run was executing.
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
        """Ask a run to stop, even while the engine is still starting. Ignore unknown ids."""
        if (active := self._runs.get(str(run_id))) is not None:
            active.ask_to_stop()

    async def healthy(self) -> bool:
        """Return whether the engine runs and answers a probe within `probe_s` seconds."""
        return self.alive and await self._client.responds(self._limits.probe_s)

    async def vram(self) -> Vram | None:
        """Return the GPU memory that ComfyUI reports, or None without a GPU.

        Raises EngineUnavailable or EngineFailed.
        """
        return (await self._client.system_stats()).vram

    @property
    def broken(self) -> EngineUnavailable | None:
        """The last start's error after `broken_after_starts` failures in a row, otherwise None."""
        return self._starts.broken

    @property
    def url(self) -> str:
        return self._host.base_url

    @property
    def alive(self) -> bool:
        """Return whether the engine runs, as far as is known without a request."""
        return self._session is not None and self._session.alive

    async def restart(self) -> None:
        """Restart an owned engine once no run is in it. Raises EngineUnavailable."""
        self._restart_due = True
        await self._ready()

    async def node_classes(self) -> frozenset[str]:
        """Return the class names of the engine's nodes. Raises EngineUnavailable."""
        return await self._client.node_classes()

    async def aclose(self) -> None:
        """Stop all runs, wait for their outcomes, then stop an owned engine. Idempotent."""
        self._closed.set()
        for active in self._runs.values():
            active.ask_to_stop()
        async with self._starting:
            await self._all_runs_ended()
            try:
                await self._stop()
            finally:
                await self._client.aclose()

    async def _execute(self, active: RunInEngine, session: EngineSession) -> EngineResult:
        """Execute the run in its own task, which cleans up even if the caller is cancelled."""
        task = asyncio.create_task(active.execute(session))
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
        """Return the session of a live engine, starting it if needed. Raises EngineUnavailable."""
        async with self._starting:
            if self._closed.is_set():
                raise EngineUnavailable("the engine is closed")
            session = self._session
            if session is not None and session.alive:
                if reason := await self._restart_reason():
                    log.info("engine_restart_due", reason=reason, runs=self._runs_since_start)
                    await self._all_runs_ended()  # new runs wait for the lock
                elif (
                    self._tasks  # their watchdogs detect a hang
                    or self._client.responded_within(self._limits.recent_s)  # quicker than a probe
                    or await self._client.responds(self._limits.probe_s)
                ):
                    return session
            await self._stop()
            self._session = await self._start()
            return self._session

    async def _all_runs_ended(self) -> None:
        if leaving := self._tasks | self._cleaning:
            await asyncio.wait(leaving)

    async def _restart_reason(self) -> str:
        """Return the reason to restart an owned engine between two runs, or an empty string."""
        if self._host.pid is None:
            return ""
        if self._restart_due:
            return "a restart was requested"
        if not self._runs_since_start:
            return ""
        if 0 < self._limits.restart_after_runs <= self._runs_since_start:
            return "the maximum number of runs was reached"
        if limit := self._limits.memory_limit_bytes:
            resident = await asyncio.to_thread(resident_bytes, self._host.pid)
            if resident > limit:
                return f"its memory grew to {resident // 1_000_000} MB"
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
        self.version = ""
        with contextlib.suppress(EngineUnavailable, EngineFailed):  # informative only
            self.version = (await self._client.system_stats()).version
        self._runs_since_start = 0
        self._restart_due = False
        return EngineSession(self._client, self._host, ended, self._connected)

    async def _stop(self) -> None:
        self._session = None
        if self._socket is not None:
            await self._socket.aclose()
        await self._host.stop()

    async def _connected(self) -> EventSocket:
        """Return the live websocket, opening one with a new client id if the last was dropped."""
        async with self._connecting:
            if self._socket is None or self._socket.closed:
                self._socket = await EventSocket.open(
                    self.url, self._dispatch, self._dropped, self._limits.answer_s
                )
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
    """Wait until `task` ends, ignoring cancellation, and discard its result."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        log.info("cancelled_run_ended", outcome=repr(error))
    elif not task.cancelled() and isinstance(result := task.result(), Pixels):
        await result.discard()
