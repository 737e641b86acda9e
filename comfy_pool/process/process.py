"""Start, watch and stop a ComfyUI process.

The engine is a `ChildProcess`: it and its descendants end with their owner, even after SIGKILL. A
thread drains the engine's output, so that neither a slow event loop nor a full pipe can block it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging.handlers
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Self

import structlog

from comfy_pool.nodes import FOLDER_VARIABLE, loopback
from comfy_pool.pixels import NODES
from restoration.errors import EngineUnavailable
from restoration.processes.child import KILL_S, ChildProcess, ExitInfo, Program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

LOG_FILE = "engine.log"  # in the engine's base directory

_FOLDERS = ("custom_nodes", "input", "output", "temp", "user")
_LOG_BYTES = 8 << 20  # of engine.log and of its one backup each
_LINE_BYTES = 8 << 10  # longer lines are split
_TAIL_LINES = 200
_PROBE_PERIOD_S = 0.2
_ORPHAN_GRACE_S = 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """Parameters of a ComfyUI process.

    `base_dir` belongs to this engine alone; `models_dir` is shared. `environ` replaces the
    inherited environment. The process tree keeps `inherit_fds` open until it ends. The engine
    hands results over in `pixels_dir` if that is set. `nodes` are folders of further custom nodes.
    """

    python: Path
    app_dir: Path
    base_dir: Path
    models_dir: Path
    port: int
    variant: Literal["cpu", "cuda"]
    environ: Mapping[str, str]
    inherit_fds: tuple[int, ...] = ()
    pixels_dir: Path | None = None
    nodes: tuple[Path, ...] = ()

    def argv(self) -> list[str]:
        """Return the command line. Source of the options: ComfyUI's comfy/cli_args.py."""
        base_dir = self.base_dir.absolute()
        argv = [str(self.python.absolute()), "-u"]  # unbuffered: keep the last lines of a crash
        argv.append(str(self.app_dir.absolute() / "main.py"))
        if self.variant == "cpu":
            argv.append("--cpu")
        argv += ["--port", str(self.port), "--listen", "127.0.0.1"]
        argv += ["--disable-auto-launch", "--disable-metadata"]
        argv += ["--base-directory", str(base_dir)]
        # The default is in the application's folder, which engines share.
        argv += ["--database-url", f"sqlite:///{base_dir / 'user' / 'comfyui.db'}"]
        return argv

    def prepare(self) -> None:
        """Create the folders that ComfyUI expects, with mode 0700. Idempotent."""
        self.base_dir.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.base_dir, *(self.base_dir / name for name in _FOLDERS)):
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)
        models = self.base_dir / "models"
        models.unlink(missing_ok=True)
        models.symlink_to(self.models_dir.absolute())
        custom_nodes = self.base_dir / "custom_nodes"
        for link in filter(Path.is_symlink, custom_nodes.iterdir()):
            link.unlink()
        for nodes in self.nodes:
            (custom_nodes / nodes.name).symlink_to(nodes.absolute())
        (custom_nodes / "comfy-restore").symlink_to(NODES)

    def program(self) -> Program:
        """Return the program, with the variables of `comfy_pool.nodes` in its environment."""
        folder = {} if self.pixels_dir is None else {FOLDER_VARIABLE: str(self.pixels_dir)}
        return Program(
            argv=self.argv(),
            cwd=self.base_dir,
            env={**self.environ, **folder, loopback.VARIABLE: "1"},
            inherit_fds=self.inherit_fds,
            stop_tree=True,
            orphan_grace_s=_ORPHAN_GRACE_S,
            # Ray kills a dead worker's children, process group and session before a guard among
            # them could act.
            detached=True,
        )


class EngineLog:
    """Keeps an engine's last lines of output, and passes all to a bounded file and `on_line`."""

    def __init__(self, path: Path, on_line: Callable[[str], None] | None) -> None:
        self._path = path
        self._on_line = on_line
        self._last: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)

    def tail(self, lines: int) -> list[str]:
        return list(self._last.copy())[-lines:]

    def drain(self, pipe: IO[bytes]) -> None:
        """Read lines until the last writer has closed the pipe."""
        file = logging.handlers.RotatingFileHandler(
            self._path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", delay=True
        )
        with contextlib.closing(file):
            file.doRollover()
            while raw := pipe.readline(_LINE_BYTES):
                # Of a progress bar that redraws itself, keep the text that a terminal would show.
                line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
                self._last.append(line)
                file.handle(logging.makeLogRecord({"msg": line}))
                try:
                    if self._on_line is not None:
                        self._on_line(line)
                except Exception:  # an error of the listener must not stop the draining
                    log.exception("engine_listener_failed")


class EngineProcess:
    """A running engine process. Create it with `start`; end it with `stop` or `async with`."""

    pid: int  # of ComfyUI, not of its guard

    def __init__(self, command: EngineCommand, on_line: Callable[[str], None] | None) -> None:
        self._log = EngineLog(command.base_dir / LOG_FILE, on_line)
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[ChildProcess | None] = self._loop.create_future()
        self._ended: asyncio.Future[ExitInfo] = self._loop.create_future()
        # Not in the event loop's thread pool: a full pool would delay the start and the draining.
        self._keeper = threading.Thread(
            target=self._keep, args=(command,), name="engine-log", daemon=True
        )
        self._keeper.start()

    @classmethod
    async def start(
        cls, command: EngineCommand, *, on_line: Callable[[str], None] | None = None
    ) -> Self:
        """Start the process without waiting until the engine is ready.

        `on_line` is called with each line of output, in the log thread. If the call is cancelled,
        the process is stopped. Raises EngineUnavailable if the process cannot be started.
        """
        try:
            await asyncio.to_thread(command.prepare)
        except OSError as error:
            raise EngineUnavailable(f"cannot prepare the engine's folder: {error}") from error
        process = cls(command, on_line)
        try:
            child = await asyncio.shield(process._started)
        except BaseException:
            await process.stop(grace_s=0)
            raise
        if child is None:
            raise EngineUnavailable("the engine could not be started", log=process.tail())
        process.pid = child.pid
        return process

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def wait_ready(self, probe: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Return once `probe` succeeds.

        Raises EngineUnavailable if the engine ends first or `timeout_s` passes; its detail `log`
        holds the last lines of output.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self._ended.done():
                    if await probe():
                        return
                    await asyncio.wait({self._ended}, timeout=_PROBE_PERIOD_S)
        except TimeoutError:
            late = f"the engine was not ready within {timeout_s:g} s"
            raise EngineUnavailable(late, log=self.tail()) from None
        ended = f"the engine {self._ended.result()} before it was ready"
        raise EngineUnavailable(ended, log=self.tail())

    async def exited(self) -> ExitInfo:
        """Wait until the whole process tree has ended, and return how the engine exited."""
        return await asyncio.shield(self._ended)

    def tail(self, lines: int = 20) -> list[str]:
        """Return the last lines of output, oldest first; at most 200 are kept."""
        return self._log.tail(lines)

    async def stop(self, grace_s: float = 10.0) -> None:
        """Stop the process tree with SIGTERM, and SIGKILL after `grace_s` seconds. Idempotent.

        Stopping continues if the caller is cancelled. Raises EngineUnavailable if a process
        outlives SIGKILL.
        """

        def stop_child(started: asyncio.Future[ChildProcess | None]) -> None:
            if (child := started.result()) is not None:
                child.stop(grace_s)

        self._started.add_done_callback(stop_child)
        done, _ = await asyncio.wait({self._ended}, timeout=grace_s + KILL_S)
        if not done:
            raise EngineUnavailable("the engine's processes survived SIGKILL", log=self.tail())

    def _keep(self, command: EngineCommand) -> None:
        """Start the engine and drain the tree's output until it ends. Runs in the log thread."""
        reader, writer = os.pipe()
        child = None
        with open(reader, "rb") as pipe:
            try:
                child = ChildProcess(command.program(), writer, self._on_exit)
                self._resolve(self._started, child)
            except OSError as error:
                os.write(writer, f"cannot start the guard: {error}\n".encode())
            finally:
                os.close(writer)
            self._log.drain(pipe)
        if child is None:
            self._resolve(self._started, None)
            self._resolve(self._ended, ExitInfo(None))

    def _on_exit(self, how: ExitInfo) -> None:
        self._keeper.join(KILL_S)  # a process that has escaped may hold the pipe
        self._resolve(self._ended, how)

    def _resolve(self, future: asyncio.Future[Any], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(future.set_result, value)
