"""Where an engine runs: a process that is ours (`OwnedHost`), or a server that is not.

`EngineHost` is all that the engine asks of either. What is not ours is neither started, stopped
nor cleaned beyond what the protocol allows.
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

# The runs' folders lie in one folder, so that ComfyUI's own listings of its input stay short.
RUNS_FOLDER = "comfy-restore"

START_FAILURE = "start-failure.txt"  # in an engine's base directory, while its last start failed

_GRACE_S = 1.0  # ComfyUI ends at once on SIGTERM, unless it hangs

log = structlog.get_logger(__name__)

Probe = Callable[[], Awaitable[bool]]


class EngineHost(Protocol):
    @property
    def base_url(self) -> str: ...

    @property
    def pid(self) -> int | None:
        """ComfyUI's process, while there is one that is ours."""

    @property
    def inputs(self) -> Path | None:
        """The engine's folder of pictures to load; None if its files cannot be reached."""

    @property
    def pixels(self) -> Path | None:
        """Where our own output node puts pixels; None if the engine does not have that node."""

    async def start(self, probe: Probe) -> asyncio.Future[str]:
        """Return once `probe` says that the engine is ready. Raises EngineUnavailable.

        The future tells how this engine ended, once it has; one that is not ours never does.
        Called again after that end or `stop`, it starts the engine anew.
        """

    async def stop(self) -> None:
        """Stop it if it is ours; repeatable."""

    def executes(self, log_context: Mapping[str, str | int]) -> None:
        """Of the run that the engine executes from now on; empty when it executes none."""

    async def clear(self, folder: str) -> None:
        """Delete a folder of the engine's input and output, if its files can be reached."""


class OwnedHost:
    """A ComfyUI of our own, on this machine, with a base directory that no other engine uses."""

    def __init__(
        self, command: EngineCommand, *, slot: int | str = 0, start_timeout_s: float = 120.0
    ) -> None:
        self._command = command
        self._slot = slot
        self._start_timeout_s = start_timeout_s
        self._process: EngineProcess | None = None
        self._ended: asyncio.Task[str] | None = None
        self._stopping = False
        self._executes: Mapping[str, str | int] = {}  # read by the thread of the engine's log
        self._engine_log = structlog.get_logger("comfyui").bind(slot=slot)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._command.port}"

    @property
    def pid(self) -> int | None:
        """ComfyUI's process, while there is one or its end is not yet cleared away."""
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
            process = await self._launch(probe)
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
            await asyncio.to_thread(_remove, path)

    async def _launch(self, probe: Probe) -> EngineProcess:
        process = await EngineProcess.start(self._command, on_line=self._on_line)
        try:
            await process.wait_ready(probe, self._start_timeout_s)
        except BaseException:
            await process.stop(grace_s=0)
            raise
        return process

    async def _watch(self, process: EngineProcess) -> str:
        how = str(await process.exited())
        if not self._stopping:
            log.error("engine_ended", slot=self._slot, pid=process.pid, how=how, log=process.tail())
        return how

    def _on_line(self, line: str) -> None:
        if line:
            self._engine_log.info("engine_says", line=line, **self._executes)


class AttachedHost:
    """A ComfyUI that somebody else runs at `base_url`."""

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
            raise EngineUnavailable(f"no ComfyUI answers at {self._base_url}")
        # Its end shows by unanswered requests only.
        return asyncio.get_running_loop().create_future()

    async def stop(self) -> None: ...

    def executes(self, log_context: Mapping[str, str | int]) -> None: ...

    async def clear(self, folder: str) -> None: ...


def _remove(path: Path) -> None:
    """Delete a tree, or what can be deleted of it."""
    shutil.rmtree(path, ignore_errors=True)


def _note(base_dir: Path, failure: str | None) -> None:
    """Leave word of how the last start went, for `comfy_pool.doctor.engine`; best effort."""
    note = base_dir / START_FAILURE
    with contextlib.suppress(OSError):
        if failure is None:
            note.unlink(missing_ok=True)
        else:
            note.write_text(failure)
