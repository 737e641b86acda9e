"""The life of one run in an engine: upload, submit, wait for its outcome, fetch, clean up.

History is the truth about an outcome; events only say when to look, and how far the run is. So a
lost event or a dropped socket costs a run nothing but progress. Every wait ends: with history, with
the engine's end, or when the engine has neither the run nor an answer for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from comfy_pool.answers import HistoryEntry, Rejected
from comfy_pool.client import ComfyClient
from comfy_pool.event_socket import EventSocket
from comfy_pool.hosts import RUNS_FOLDER, EngineHost
from comfy_pool.outcome import output_of
from comfy_pool.progress import ProgressMeter
from comfy_pool.wire import Executing, Message, NodeError, Preview
from restoration.errors import (
    EngineCrashed,
    EngineError,
    EngineInterrupted,
    EngineRejected,
    EngineUnavailable,
)
from restoration.ports import EngineEvent, EnginePreview, EngineProgress, EngineRun, Prompt

_END_REPORT_S = 1.0  # a dead process drops its connections a little before its end is reported

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How patient an engine's runs are."""

    # A node may hold the interpreter's lock meanwhile, or a model load.
    answer_s: float = 30.0
    probe_s: float = 5.0  # an idle engine that takes longer to say it is well is hung
    poll_s: float = 5.0  # history is read at least this often, whatever the events say
    blind_poll_s: float = 0.5  # the same without events: after the run's socket was dropped
    stop_poll_s: float = 0.2  # an interrupt can get lost, and is repeated this often
    # An interrupt works at the next node or step; one tile on a CPU takes up to half a minute.
    stop_s: float = 60.0
    unreachable_s: float = 30.0  # an engine that answers nothing for so long is hung


@dataclass(frozen=True, slots=True)
class Link:
    """What a run needs of the engine it is in; `ended` tells how that engine's process ended."""

    client: ComfyClient
    host: EngineHost
    ended: asyncio.Future[str]
    connect: Callable[[], Awaitable[EventSocket]]
    limits: EngineLimits


class RunInEngine:
    """One run, from upload to clean-up; `execute` is called once."""

    def __init__(self, run: EngineRun, on_event: Callable[[EngineEvent], None]) -> None:
        self.id = str(run.id)
        self.folder = f"{RUNS_FOLDER}/{run.id}"
        self._run = run
        self._on_event = on_event
        self._meter: ProgressMeter | None = None
        self._socket: EventSocket | None = None
        self._heard: NodeError | None = None
        self._wake = asyncio.Event()
        self._stop_asked_at: float | None = None
        self._queued = False  # ComfyUI has the prompt, or may have it

    def ask_to_stop(self) -> None:
        """`execute` sees to it, and tells the outcome."""
        if self._stop_asked_at is None:
            self._stop_asked_at = time.monotonic()
        self.wake()

    def wake(self) -> None:
        """Look at history now."""
        self._wake.set()

    def handle(self, message: Message) -> None:
        """Take an event of this run; before it was submitted and after its end there are none."""
        if self._meter is None:
            return
        match message:
            case Executing(node=None):
                self.wake()
            case Preview(image=image, content_type=content_type):
                self._on_event(EnginePreview(image, content_type))
            case NodeError():
                self._heard = message
            case _:
                if (progress := self._meter.update(message)) is not None:
                    self._on_event(progress)

    async def execute(self, link: Link) -> bytes:
        """The PNG; see `restoration.ports.Engine.run` for the errors."""
        wake = _calls(self.wake)
        link.ended.add_done_callback(wake)
        try:
            return await self._execute(link)
        except EngineUnavailable as error:
            await asyncio.wait({link.ended}, timeout=_END_REPORT_S)
            if link.ended.done():
                raise EngineCrashed(f"the engine {link.ended.result()}") from error
            raise
        finally:
            link.ended.remove_done_callback(wake)
            await self._clean(link)

    async def _execute(self, link: Link) -> bytes:
        name = await link.client.upload(
            self._run.image, f"input{self._run.image_suffix}", self.folder
        )
        prompt = self._run.render(name, f"{self.folder}/output")
        await self._submit(link, prompt)
        entry = await self._outcome(link)
        self._meter = None
        image = output_of(
            entry,
            self._run.output_node,
            self.folder,
            stop_asked=self._stop_asked_at is not None,
            heard=self._heard,
        )
        png = await link.client.view(image)
        node_class = str(prompt[self._run.output_node]["class_type"])
        self._on_event(EngineProgress(1.0, node_class))
        return png

    async def _submit(self, link: Link, prompt: Prompt) -> None:
        self._meter = ProgressMeter(prompt)
        self._socket = await link.connect()
        if self._stop_asked_at is not None:
            raise EngineInterrupted("the run was stopped before it began")
        if link.ended.done():  # and another may have been started in its place meanwhile
            raise EngineCrashed(f"the engine {link.ended.result()}")
        self._queued = True
        answer = await link.client.submit(prompt, self.id, self._socket.client_id)
        if isinstance(answer, Rejected):
            self._queued = answer.queued
            raise EngineRejected(answer.message, node_errors=dict(answer.node_errors))

    async def _outcome(self, link: Link) -> HistoryEntry:
        """The history entry, once it is there; meanwhile carries out what `ask_to_stop` wants.

        Raises EngineCrashed when the engine has ended, hangs, or does not know the run any more;
        EngineInterrupted when the run was taken from the queue.
        """
        answered_at = time.monotonic()
        while True:
            await self._pause(link.limits)
            if link.ended.done():
                self._queued = False
                raise EngineCrashed(f"the engine {link.ended.result()}")
            try:
                if self._stop_asked_at is not None:
                    await self._push_stop(link, self._stop_asked_at)
                if (entry := await self._look_up(link.client)) is not None:
                    return entry
                answered_at = time.monotonic()
            except EngineUnavailable as error:
                if time.monotonic() - answered_at > link.limits.unreachable_s:
                    await self._give_up(link, f"the engine hangs: {error.message}")

    async def _pause(self, limits: EngineLimits) -> None:
        """Until there is a reason to look at history, or it is time to look without one."""
        period_s = limits.poll_s
        if self._stop_asked_at is not None:
            period_s = limits.stop_poll_s
        elif self._socket is None or self._socket.closed:
            period_s = limits.blind_poll_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(period_s):
                await self._wake.wait()
        self._wake.clear()

    async def _look_up(self, client: ComfyClient) -> HistoryEntry | None:
        """The history entry, or None while the engine has the run in its queue."""
        if (entry := await client.history(self.id)) is None:
            if await client.queued_or_running(self.id):
                return None
            # Between the two readings the run may have gone from the queue to history.
            entry = await client.history(self.id)
        self._queued = False
        if entry is not None:
            return entry
        if self._stop_asked_at is not None:
            raise EngineInterrupted("the run was taken from the queue")
        raise EngineCrashed("the engine does not know the run any more")

    async def _push_stop(self, link: Link, asked_at: float) -> None:
        """Whether the run waits or runs, one of the two stops it, and neither another run."""
        if time.monotonic() - asked_at > link.limits.stop_s:
            await self._give_up(link, f"the run did not stop within {link.limits.stop_s:g} s")
        await link.client.dequeue(self.id)
        await link.client.interrupt(self.id)

    async def _give_up(self, link: Link, reason: str) -> None:
        """End an engine that is ours and hangs: the next run starts it anew."""
        self._queued = False
        _log.error("engine given up", run=self.id, reason=reason)
        await link.host.stop()
        raise EngineCrashed(reason)

    async def _clean(self, link: Link) -> None:
        """Leave nothing behind; what fails here has no effect on the outcome."""
        if self._queued:
            # Validated in part only, or the answer to its submission never came.
            self.ask_to_stop()
            with contextlib.suppress(EngineError):
                await self._outcome(link)
        if not link.ended.done():
            try:
                await link.client.forget(self.id)
            except EngineError as error:
                _log.warning("history entry left", run=self.id, error=error.message)
        await link.host.clear(self.folder)


def _calls(function: Callable[[], None]) -> Callable[[object], None]:
    return lambda _: function()
