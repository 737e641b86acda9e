"""Hosts of an engine: an owned ComfyUI process, or an attached server that others operate.

Both implement `EngineHost`. An attached server is never started or stopped, and is cleaned up only
through its API.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

import structlog

from comfy_pool.process.process import EngineCommand, EngineProcess
from restoration.errors import EngineUnavailable

# Parent of the runs' folders, which keeps ComfyUI's listing of its input folder short.
RUNS_FOLDER = "comfy-restore"

START_FAILURE = "start-failure.txt"  # in the base directory if the engine's last start failed

_GRACE_S = 1.0  # ComfyUI ends at once on SIGTERM unless it hangs

log = structlog.get_logger(__name__)

Probe = Callable[[], Awaitable[bool]]


class EngineHost(Protocol):
    @property
    def base_url(self) -> str: ...

    @property
    def pid(self) -> int | None:
        """The pid of an owned ComfyUI, None if there is none."""

    @property
    def inputs(self) -> Path | None:
        """The engine's input folder; None if its files are not accessible."""

    @property
    def pixels(self) -> Path | None:
        """The folder for pixels handed over by `comfy_pool.nodes`; None without that node pack."""

    async def start(self, probe: Probe) -> asyncio.Future[str]:
        """Start the engine and return once `probe` succeeds. Raises EngineUnavailable.

        The returned future resolves to a description of the engine's end; for an attached engine
        it stays pending. Call `start` again to restart the engine.
        """

    async def stop(self) -> None:
        """Stop an owned engine. Idempotent."""

    def executes(self, log_context: Mapping[str, str | int]) -> None:
        """Set the log context of the executing run; empty if none executes."""

    async def clear(self, folder: str) -> None:
        """Delete `folder` from the engine's input and output, if its files are accessible."""


class OwnedHost:
    """An owned ComfyUI process on this machine, with its own base directory."""

    def __init__(
        self, command: EngineCommand, *, slot: int | str = 0, start_timeout_s: float = 120.0
    ) -> None:
        self._command = command
        self._slot = slot
        self._start_timeout_s = start_timeout_s
        self._process: EngineProcess | None = None
        self._ended: asyncio.Task[str] | None = None
        self._stopping = False
        self._executes: Mapping[str, str | int] = {}  # read by the log thread
        self._engine_log = structlog.get_logger("comfyui").bind(slot=slot)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._command.port}"

    @property
    def pid(self) -> int | None:
        """The pid of the last started process, None before the first start.

        It stays set after the process has ended.
        """
        return self._process.pid if self._process else None

    @property
    def inputs(self) -> Path | None:
        return self._command.base_dir / "input"

    @property
    def pixels(self) -> Path | None:
        return self._command.pixels_dir

    async def start(self, probe: Probe) -> asyncio.Future[str]:
        await self.stop()
        await self.clear(RUNS_FOLDER)  # left by a predecessor that was killed
        try:
            process = await EngineProcess.start(self._command, on_line=self._on_line)
            try:
                await process.wait_ready(probe, self._start_timeout_s)
            except BaseException:
                await process.stop(grace_s=0)
                raise
        except EngineUnavailable as error:
            await asyncio.to_thread(_note, self._command.base_dir, error.message)
            raise
        self._process, self._stopping = process, False
        await asyncio.to_thread(_note, self._command.base_dir, None)
        self._ended = asyncio.create_task(self._watch(process))
        log.info("engine_started", slot=self._slot, pid=process.pid, url=self.base_url)
        return self._ended

    async def stop(self) -> None:
        self._stopping = True
        if self._process is not None:
            await self._process.stop(grace_s=_GRACE_S)
        if self._ended is not None:
            await asyncio.wait({self._ended})

    def executes(self, log_context: Mapping[str, str | int]) -> None:
        self._executes = log_context

    async def clear(self, folder: str) -> None:
        for side in ("input", "output"):
            path = self._command.base_dir / side / folder
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def _watch(self, process: EngineProcess) -> str:
        how = str(await process.exited())
        if not self._stopping:
            log.error("engine_ended", slot=self._slot, pid=process.pid, how=how, log=process.tail())
        return how

    def _on_line(self, line: str) -> None:
        if line:
            self._engine_log.info("engine_says", line=line, **self._executes)


class AttachedHost:
    """A ComfyUI at `base_url` that others operate."""

    pid = None
    inputs = None
    pixels = None

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url

    @property
    def base_url(self) -> str:
        return self._base_url

    async def start(self, probe: Probe) -> asyncio.Future[str]:
        if not await probe():
            raise EngineUnavailable(f"no ComfyUI responds at {self._base_url}")
        # The end of an attached engine shows only as unanswered requests.
        return asyncio.get_running_loop().create_future()

    async def stop(self) -> None: ...

    def executes(self, log_context: Mapping[str, str | int]) -> None: ...

    async def clear(self, folder: str) -> None: ...


def _note(base_dir: Path, failure: str | None) -> None:
    """Record the last start's failure for `comfy_pool.doctor.engine`, or clear it. Best effort."""
    note = base_dir / START_FAILURE
    with contextlib.suppress(OSError):
        if failure is None:
            note.unlink(missing_ok=True)
        else:
            note.write_text(failure)
