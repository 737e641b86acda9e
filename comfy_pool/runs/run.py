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
from comfy_pool.pixels import bound, taken
from comfy_pool.process.hosts import RUNS_FOLDER
from comfy_pool.protocol.client import ComfyClient
from comfy_pool.protocol.messages import Executing, Message, Preview, Started
from comfy_pool.protocol.responses import HandedOver, HistoryEntry, OutputImage, Rejected
from comfy_pool.protocol.websocket import EventSocket
from comfy_pool.runs.event_log import RunEventLog
from comfy_pool.runs.progress import ProgressMeter
from comfy_pool.runs.result import output_of
from comfy_pool.runs.session import EngineSession
from comfy_pool.runs.watchdog import Watchdog
from restoration.engine_port import (
    EngineBegan,
    EngineEvent,
    EngineNode,
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

    def __init__(
        self, run: EngineRun, on_event: Callable[[EngineEvent], None], limits: EngineLimits
    ) -> None:
        self.id = str(run.id)
        self.log_context = run.log_context
        self.folder = f"{RUNS_FOLDER}/{run.id}"
        self._run = run
        self._on_event = on_event
        self._limits = limits
        self._patience = Watchdog(limits)
        self._meter: ProgressMeter | None = None
        self._link: EngineSession | None = None
        self._socket: EventSocket | None = None
        self._heard = RunEventLog(run.output_node)
        self._wake = asyncio.Event()
        self.result: asyncio.Future[EngineResult] = asyncio.get_running_loop().create_future()
        self._began = False
        self._taken = False  # whether the caller owns the pixel file
        self._submitted = False
        self._queued = False  # whether ComfyUI has, or may have, the prompt in its queue

    def ask_to_stop(self) -> None:
        """Request a stop. `execute` carries it out and returns or raises the outcome."""
        self._patience.ask_to_stop()
        self.wake()

    def wake(self) -> None:
        """Check the history now."""
        self._wake.set()

    def handle(self, message: Message) -> None:
        """Process an event of this run. Ignored before its submission and after its end."""
        if self._meter is None or self._link is None:
            return
        self._patience.sign_of_life()
        self._begins()
        self._heard.take(message)
        match message:
            case Started():
                self._link.began(self.id)
            case Executing(node=None):
                self._link.executed(self.id)
                self.wake()
            case Preview(image=image, content_type=content_type):
                self._on_event(EnginePreview(image, content_type))
            case _:
                if node_class := self._meter.begins(message):
                    self._on_event(EngineNode(node_class))
                if (progress := self._meter.update(message)) is not None:
                    self._on_event(progress)

    async def execute(self, link: EngineSession) -> EngineResult:
        """Return the picture; see `restoration.engine_port.Engine.run` for the errors.

        `result` is set before the clean-up, so that the caller need not wait for it.

        EngineUnavailable means that the engine ended while another run was executing, or was
        unreachable before the prompt was sent. It never blames this run; every other error may.
        """
        self._link = link
        wake = _calls(self.wake)
        link.ended.add_done_callback(wake)
        try:
            self.result.set_result(await self._execute(link))
            return self.result.result()
        except EngineUnavailable as error:
            if link.alive:
                await asyncio.wait({link.ended}, timeout=_END_REPORT_S)
            if not link.alive:
                raise link.end_for(self.id) from error
            if not self._submitted:
                raise
            raise EngineCrashed(f"the engine lost the run: {error.message}") from error
        finally:
            link.ended.remove_done_callback(wake)
            await self._clean(link)
            link.left(self.id)

    async def _execute(self, link: EngineSession) -> EngineResult:
        name = await self._stage(link)
        prompt = self._run.render(name, f"{self.folder}/output")
        await self._submit(link, prompt)
        entry = await self._outcome(link)
        self._begins()
        self._meter = None
        result = await self._fetch(link, self._output(entry))
        node_class = str(prompt[self._run.output_node]["class_type"])
        self._on_event(EngineProgress(1.0, node_class))
        return result

    async def _stage(self, link: EngineSession) -> str:
        """Store the picture in the engine's input folder. Return its name for LoadImage."""
        filename = f"input{self._run.image_suffix}"
        if link.host.inputs is None:
            return await link.client.upload(self._run.image, filename, self.folder)
        path = link.host.inputs / self.folder / filename
        await asyncio.to_thread(_write, path, self._run.image)
        return f"{self.folder}/{filename}"

    async def _submit(self, link: EngineSession, prompt: Prompt) -> None:
        self._meter = ProgressMeter(prompt)
        self._socket = await link.connect()
        if self._patience.stop_asked:
            raise EngineInterrupted("the run was stopped before it started")
        if not link.alive:  # the socket may belong to another engine, started meanwhile
            raise link.end_for(self.id)
        self._submitted = self._queued = True
        link.submitted(self.id)
        self._patience.sign_of_life()
        self._on_event(EngineStaged())
        if link.host.pixels is not None:
            prompt = bound(prompt, self._run.output_node, self.id)
        answer = await link.client.submit(prompt, self.id, self._socket.client_id)
        if isinstance(answer, Rejected):
            self._queued = answer.queued
            raise EngineRejected(answer.message, node_errors=dict(answer.node_errors))

    async def _outcome(self, link: EngineSession) -> HistoryEntry:
        """Wait for the history entry, and stop the run meanwhile if that was requested.

        Raises `link.end_for` if the engine ends or is given up, EngineCrashed if the engine no
        longer knows the run, and EngineInterrupted if the run was removed from the queue.
        """
        self._patience.answered()
        while link.alive:
            await self._pause()
            if (entry := await self._attend(link)) is not None:
                return entry
        raise link.end_for(self.id)

    async def _attend(self, link: EngineSession) -> HistoryEntry | None:
        """Check the run once. Give the engine up if a limit of the watchdog is exceeded."""
        if not link.alive:  # the answer could come from another engine, started meanwhile
            return None
        no_answer = ""
        try:
            async with asyncio.timeout(self._limits.unreachable_s):
                await self._push_stop(link.client)
                if (entry := await self._look_up(link)) is not None:
                    return entry
            self._patience.answered()
        except (EngineUnavailable, TimeoutError) as error:
            no_answer = str(error) or "no response in time"
        self._patience.check_stall(deaf=self._deaf)
        if reason := self._patience.end(no_answer):
            await link.give_up(reason)
        return None

    @property
    def _deaf(self) -> bool:
        """Return whether events cannot arrive: they go to the submission's socket only."""
        return self._socket is None or self._socket.closed

    async def _pause(self) -> None:
        """Wait until `wake` is called or the polling interval has passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience.look_after_s(deaf=self._deaf)):
                await self._wake.wait()
        self._wake.clear()

    async def _look_up(self, link: EngineSession) -> HistoryEntry | None:
        """Return the history entry, or None while the run is queued or executing."""
        if (entry := self._heard.entry or await link.client.history(self.id)) is None:
            queue = await link.client.queue()
            if self.id in queue.running:
                self._begins()
            elif self.id in queue.pending and queue.running:
                self._patience.sign_of_life()
            if self.id in queue.pending | queue.running:
                return None
            # The run may have moved from the queue to the history between the two reads.
            entry = await link.client.history(self.id)
        self._queued = False
        link.executed(self.id)
        if entry is not None:
            return entry
        if self._patience.stop_asked:
            raise EngineInterrupted("the run was removed from the queue")
        raise EngineCrashed("the engine no longer knows the run")

    def _begins(self) -> None:
        """Report once that the run executes. Any event shows it: a waiting run has none."""
        if not self._began:
            self._began = True
            self._on_event(EngineBegan())

    async def _push_stop(self, client: ComfyClient) -> None:
        """Dequeue and interrupt the run if a stop was requested; interrupt it if it has stalled.

        Dequeuing affects only a waiting prompt, interrupting only the executing one. Both name this
        run, so neither affects another.
        """
        if self._patience.stop_asked:
            await client.dequeue(self.id)
        if self._patience.stop_asked or self._patience.stalled:
            await client.interrupt(self.id)

    async def _fetch(self, link: EngineSession, output: OutputImage | HandedOver) -> EngineResult:
        if isinstance(output, OutputImage):
            return await link.client.view(output)
        if (path := self._pixels(link)) is None:
            raise EngineFailed("the engine returned pixels that were not requested")
        result = await asyncio.to_thread(taken, output, path)
        self._taken = True
        return result

    def _pixels(self, link: EngineSession) -> Path | None:
        """Return the file for this run's pixels, or None if the engine cannot hand them over."""
        return None if link.host.pixels is None else link.host.pixels / self.id

    def _output(self, entry: HistoryEntry) -> OutputImage | HandedOver:
        if entry.interrupted and self._patience.stalled and not self._patience.stop_asked:
            raise EngineStalled(f"the engine sent no message for {self._limits.stall_s:g} s")
        return output_of(
            entry,
            self._run.output_node,
            self.folder,
            stop_asked=self._patience.stop_asked,
            heard=self._heard.error,
        )

    async def _clean(self, link: EngineSession) -> None:
        """Remove all traces of the run from the engine. Engine errors do not affect the outcome."""
        if self._queued and link.alive:
            # The prompt is only partly valid, or its submission was not answered.
            self.ask_to_stop()
            with contextlib.suppress(EngineError):
                await self._outcome(link)
        await asyncio.gather(self._forget(link), link.host.clear(self.folder))
        if (path := self._pixels(link)) is not None and not self._taken:
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def _forget(self, link: EngineSession) -> None:
        if link.ended.done():
            return
        try:
            if self._queued:  # in an attached engine that was given up
                await link.client.dequeue(self.id)
            await link.client.forget(self.id)
        except EngineError as error:
            log.warning("history_entry_left", run=self.id, error=error.message)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(path, "wb", opener=_private) as file:
            file.write(data)
    except OSError as error:
        raise EngineUnavailable(f"cannot write the image to {path}: {error}") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _calls(function: Callable[[], None]) -> Callable[[object], None]:
    return lambda _: function()
