"""Execute one run in an engine: upload, submit, wait for the outcome, fetch, clean up.

ComfyUI's history is authoritative for the outcome. Events trigger a read of the history and report
progress; a complete set replaces the read (`comfy_pool.runs.event_log`). A lost event or a dropped
websocket therefore costs only progress. Every wait is bounded: it ends with the history entry, with
the engine's end, if the engine does not know the run, or if it neither answers nor sends events for
too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from comfy_pool.limits import EngineLimits
from comfy_pool.pixels import read_hand_over, with_hand_over
from comfy_pool.process.hosts import RUNS_FOLDER
from comfy_pool.protocol.messages import Executing, Message, Preview, Started
from comfy_pool.protocol.responses import HistoryEntry, OutputImage, Rejected
from comfy_pool.protocol.websocket import EventSocket
from comfy_pool.runs.event_log import RunEventLog
from comfy_pool.runs.progress import ProgressMeter
from comfy_pool.runs.result import output_of
from comfy_pool.runs.session import EngineSession
from comfy_pool.runs.watchdog import Watchdog
from restoration.engine_port import (
    EngineBegan,
    EngineEvent,
    EnginePreview,
    EngineProgress,
    EngineResult,
    EngineRun,
    EngineStaged,
    Prompt,
)
from restoration.errors import (
    EngineCrashed,
    EngineError,
    EngineFailed,
    EngineInterrupted,
    EngineRejected,
    EngineStalled,
    EngineUnavailable,
)

_END_REPORT_S = 1.0  # the connections of a dying process drop shortly before its end is reported

log = structlog.get_logger(__name__)


class RunInEngine:
    """One run, from upload to clean-up. Call `execute` once."""

    _session: EngineSession  # set by `execute`, as is the next one
    _pixels: Path | None  # the file for the run's pixels, if the engine can hand them over

    def __init__(
        self, run: EngineRun, on_event: Callable[[EngineEvent], None], limits: EngineLimits
    ) -> None:
        self.id = str(run.id)
        self.log_context = run.log_context
        self.folder = f"{RUNS_FOLDER}/{run.id}"
        self.result: asyncio.Future[EngineResult] = asyncio.get_running_loop().create_future()
        self._run = run
        self._on_event = on_event
        self._limits = limits
        self._watchdog = Watchdog(limits)
        self._event_log = RunEventLog(run.output_node)
        self._meter: ProgressMeter | None = None  # set while events are processed
        self._socket: EventSocket | None = None
        self._wake = asyncio.Event()
        self._began = False
        self._taken = False  # whether the caller owns the pixel file
        self._submitted = False
        self._queued = False  # whether ComfyUI has, or may have, the prompt in its queue

    def ask_to_stop(self) -> None:
        """Request a stop. `execute` carries it out and returns or raises the outcome."""
        self._watchdog.ask_to_stop()
        self.wake()

    def wake(self, _: object = None) -> None:
        """Check the history now."""
        self._wake.set()

    def handle(self, message: Message) -> None:
        """Process an event of this run. Ignored before its submission and after its end."""
        if self._meter is None:
            return
        self._watchdog.progressed()
        self._begins()
        self._event_log.take(message)
        match message:
            case Started():
                self._session.began(self.id)
            case Executing(node=None):
                self._session.executed(self.id)
                self.wake()
            case Preview(image=image, content_type=content_type):
                self._on_event(EnginePreview(image, content_type))
            case _:
                for event in self._meter.events(message):
                    self._on_event(event)

    async def execute(self, session: EngineSession) -> EngineResult:
        """Return the picture; see `restoration.engine_port.Engine.run` for the errors.

        `result` is set before the clean-up, so that the caller need not wait for it.

        EngineUnavailable means that the engine ended while another run was executing, or was
        unreachable before the prompt was sent. It never blames this run; every other error may.
        """
        self._session = session
        folder = session.host.pixels
        self._pixels = None if folder is None else folder / self.id
        session.ended.add_done_callback(self.wake)
        try:
            self.result.set_result(await self._execute())
            return self.result.result()
        except EngineUnavailable as error:
            if session.alive:
                await asyncio.wait({session.ended}, timeout=_END_REPORT_S)
            if not session.alive:
                raise session.end_for(self.id) from error
            if not self._submitted:
                raise
            raise EngineCrashed(f"the engine lost the run: {error.message}") from error
        finally:
            session.ended.remove_done_callback(self.wake)
            await self._clean()
            session.left(self.id)

    async def _execute(self) -> EngineResult:
        name = await self._stage()
        prompt = self._run.render(name, f"{self.folder}/output")
        await self._submit(prompt)
        entry = await self._outcome()
        self._begins()
        self._meter = None
        stop_asked = self._watchdog.stop_asked
        if entry.interrupted and self._watchdog.stalled and not stop_asked:
            raise EngineStalled(f"the engine sent no message for {self._limits.stall_s:g} s")
        output = output_of(
            entry,
            self._run.output_node,
            self.folder,
            stop_asked=stop_asked,
            error_event=self._event_log.error,
        )
        result: EngineResult
        if isinstance(output, OutputImage):
            result = await self._session.client.view(output)
        elif self._pixels is None:
            raise EngineFailed("the engine returned pixels that were not requested")
        else:
            result = await asyncio.to_thread(read_hand_over, output, self._pixels)
            self._taken = True
        node_class = str(prompt[self._run.output_node]["class_type"])
        self._on_event(EngineProgress(1.0, node_class))
        return result

    async def _stage(self) -> str:
        """Store the picture in the engine's input folder. Return its name for LoadImage."""
        filename = f"input{self._run.image_suffix}"
        inputs = self._session.host.inputs
        if inputs is None:
            return await self._session.client.upload(self._run.image, filename, self.folder)
        await asyncio.to_thread(_write, inputs / self.folder / filename, self._run.image)
        return f"{self.folder}/{filename}"

    async def _submit(self, prompt: Prompt) -> None:
        session = self._session
        self._meter = ProgressMeter(prompt)
        self._socket = await session.connect()
        if self._watchdog.stop_asked:
            raise EngineInterrupted("the run was stopped before it started")
        if not session.alive:  # the socket may belong to another engine, started meanwhile
            raise session.end_for(self.id)
        self._submitted = self._queued = True
        session.submitted(self.id)
        self._watchdog.progressed()
        self._on_event(EngineStaged())
        if self._pixels is not None:
            prompt = with_hand_over(prompt, self._run.output_node, self.id)
        answer = await session.client.submit(prompt, self.id, self._socket.client_id)
        if isinstance(answer, Rejected):
            self._queued = answer.queued
            raise EngineRejected(answer.message, node_errors=dict(answer.node_errors))

    async def _outcome(self) -> HistoryEntry:
        """Wait for the history entry, and stop the run meanwhile if that was requested.

        Raises `EngineSession.end_for` if the engine ends or is given up, EngineCrashed if the
        engine no longer knows the run, and EngineInterrupted if it was removed from the queue.
        """
        self._watchdog.answered()
        while self._session.alive:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._watchdog.poll_after_s(no_events=self._no_events)):
                    await self._wake.wait()
            self._wake.clear()
            if not self._session.alive:  # an answer could come from its successor
                break
            if (entry := await self._check()) is not None:
                return entry
        raise self._session.end_for(self.id)

    async def _check(self) -> HistoryEntry | None:
        """Check the run once. Give the engine up if a limit of the watchdog is exceeded."""
        client = self._session.client
        no_answer = ""
        try:
            async with asyncio.timeout(self._limits.unreachable_s):
                # Dequeuing affects only a waiting prompt, interrupting only the executing one. Both
                # name this run, so neither affects another.
                if self._watchdog.stop_asked:
                    await client.dequeue(self.id)
                if self._watchdog.stop_asked or self._watchdog.stalled:
                    await client.interrupt(self.id)
                if (entry := await self._look_up()) is not None:
                    return entry
            self._watchdog.answered()
        except (EngineUnavailable, TimeoutError) as error:
            no_answer = str(error) or "no response in time"
        self._watchdog.check_stall(no_events=self._no_events)
        if reason := self._watchdog.reason_to_give_up(no_answer):
            await self._session.give_up(reason)
        return None

    @property
    def _no_events(self) -> bool:
        """Return whether events cannot arrive: they go to the submission's socket only."""
        return self._socket is None or self._socket.closed

    async def _look_up(self) -> HistoryEntry | None:
        """Return the history entry, or None while the run is queued or executing."""
        client = self._session.client
        if (entry := self._event_log.entry or await client.history(self.id)) is None:
            queue = await client.queue()
            if self.id in queue.running:
                self._begins()
            elif self.id in queue.pending and queue.running:
                self._watchdog.progressed()
            if self.id in queue.pending | queue.running:
                return None
            # The run may have moved from the queue to the history between the two reads.
            entry = await client.history(self.id)
        self._queued = False
        self._session.executed(self.id)
        if entry is not None:
            return entry
        if self._watchdog.stop_asked:
            raise EngineInterrupted("the run was removed from the queue")
        raise EngineCrashed("the engine no longer knows the run")

    def _begins(self) -> None:
        """Report once that the run executes. Any event shows it: a waiting run has none."""
        if not self._began:
            self._began = True
            self._on_event(EngineBegan())

    async def _clean(self) -> None:
        """Remove all traces of the run from the engine. Engine errors do not affect the outcome."""
        if self._queued and self._session.alive:
            # The prompt is only partly valid, or its submission was not answered.
            self.ask_to_stop()
            with contextlib.suppress(EngineError):
                await self._outcome()
        await asyncio.gather(self._forget(), self._session.host.clear(self.folder))
        if self._pixels is not None and not self._taken:
            await asyncio.to_thread(self._pixels.unlink, missing_ok=True)

    async def _forget(self) -> None:
        if self._session.ended.done():
            return
        try:
            if self._queued:  # in an attached engine that was given up
                await self._session.client.dequeue(self.id)
            await self._session.client.forget(self.id)
        except EngineError as error:
            log.warning("history_entry_left", run=self.id, error=error.message)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
    except OSError as error:
        raise EngineUnavailable(f"cannot write the image to {path}: {error}") from error
