"""Start a program with its process tree, which ends when it is stopped or this process ends.

A guard process (`restoration.processes.guard`) owns the tree. It ends the tree even if this process
is killed, and programs may be started from any thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KILL_S = 15.0  # wait after SIGKILL: a driver may hold a process for a while
LOG_LIMIT_BYTES = 10_000_000
LOG_TAIL_BYTES = 2_000

_GUARD = Path(__file__).with_name("guard.py")


@dataclass(frozen=True, slots=True)
class Account:
    """An account to switch to before the program starts, which only root can do."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program to start, and how to end it.

    `env` is its whole environment. Its process tree keeps `inherit_fds` open until it ends. To stop
    it, `stop_signal` is sent to the program, or with `stop_tree` to all of its descendants too. The
    tree has `orphan_grace_s` to stop if this process ends. With `detached` the guard is not a child
    of this process, for owners whose children are killed with them.
    """

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    account: Account | None = None
    inherit_fds: tuple[int, ...] = ()
    stop_signal: signal.Signals = signal.SIGTERM
    stop_tree: bool = False
    orphan_grace_s: float = 0.0
    detached: bool = False

    def guarded(self, lifeline: int) -> list[str]:
        """Return the command line of the program with its guard."""
        options = ["--lifeline", str(lifeline), "--stop-signal", str(self.stop_signal.value)]
        options += ["--orphan-grace", str(self.orphan_grace_s)]
        if self.stop_tree:
            options.append("--stop-tree")
        if self.detached:
            options.append("--detach")
        if self.account is not None:
            options += ["--uid", str(self.account.uid), "--gid", str(self.account.gid)]
        # Isolated and without site: starts quickly and ignores the program's PYTHON* variables.
        return [sys.executable, "-I", "-S", str(_GUARD), *options, "--", *self.argv]


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """The return code of an ended program, negative for a signal; None if its guard was lost."""

    returncode: int | None

    def __str__(self) -> str:
        if self.returncode is None:
            return "lost its guard"
        if self.returncode < 0:
            return f"was killed by signal {-self.returncode} ({signal.strsignal(-self.returncode)})"
        return f"exited with status {self.returncode}"


class ChildProcess:
    """A program that the constructor starts in a session of its own, without standard input.

    `output` is the descriptor for its output and errors. `on_exit` is called in another thread when
    the whole tree has ended. The constructor blocks for 0.03 s, and raises OSError if the guard
    cannot be started.
    """

    pid: int  # of the program, not of the guard

    def __init__(
        self, program: Program, output: int, on_exit: Callable[[ExitInfo], None] | None = None
    ) -> None:
        self._on_exit = on_exit
        self._exit: ExitInfo | None = None
        self._lifeline, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo:
            undo.callback(self._lifeline.close)
            with theirs:
                self._guard = subprocess.Popen(
                    program.guarded(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=program.cwd,
                    env=dict(program.env),
                    pass_fds=(*program.inherit_fds, theirs.fileno()),
                    start_new_session=True,  # a Ctrl-C in the terminal reaches only the owner
                )
            if program.detached:
                self._guard.wait()
            self._lifeline.setblocking(False)  # `stop` may be called on an event loop
            self._reports = self._read_reports()
            pid = next(self._reports, None)
            if pid is None:
                raise OSError(f"the guard of {program.argv[0]} ended at once")
            undo.pop_all()
        self.pid = pid
        self._watcher = threading.Thread(target=self._watch, name="child-process", daemon=True)
        self._watcher.start()

    @property
    def exit(self) -> ExitInfo | None:
        """Return how the program ended, or None while a process of its tree is left."""
        return self._exit

    def stop(self, grace_s: float) -> None:
        """Begin to stop the tree, with SIGKILL after `grace_s` seconds. Idempotent.

        Call it again to shorten the grace.
        """
        with contextlib.suppress(OSError):  # the guard is gone, so the tree ends as well
            self._lifeline.send(b"%f\n" % grace_s)

    def end(self, grace_s: float) -> None:
        """Stop the tree and wait for its end. A KeyboardInterrupt kills it at once."""
        self.stop(grace_s)
        try:
            self._watcher.join(grace_s)
        finally:
            self.stop(0)
            self._watcher.join()

    def _watch(self) -> None:
        with self._lifeline:
            returncode = next(self._reports, None)
        if returncode is None:  # a killed guard takes the program along, but not its children
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._guard.wait()
        self._exit = ExitInfo(returncode)
        if self._on_exit is not None:
            self._on_exit(self._exit)

    def _read_reports(self) -> Iterator[int]:
        """Wait for and yield the guard's reports: the pid, then the return code."""
        readable = select.poll()
        readable.register(self._lifeline, select.POLLIN)
        received = b""
        # The connection is reset if the guard ends without reading a stop request.
        with contextlib.suppress(ConnectionResetError):
            while readable.poll() and (chunk := self._lifeline.recv(256)):
                *reports, received = (received + chunk).split(b"\n")
                yield from map(int, reports)


class LoggedProcess(ChildProcess):
    """A child process whose output goes to `log_path`, which is rotated before the start."""

    def __init__(
        self, program: Program, log_path: Path, on_exit: Callable[[ExitInfo], None]
    ) -> None:
        self._log_path = log_path
        with contextlib.suppress(FileNotFoundError):
            if log_path.stat().st_size > LOG_LIMIT_BYTES:
                log_path.replace(log_path.with_suffix(".log.1"))
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            super().__init__(program, log.fileno(), on_exit)

    def log_tail(self) -> str:
        """Return the end of its output, up to LOG_TAIL_BYTES, without that of earlier processes."""
        with self._log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()


def run(program: Program, timeout_s: float, text: str = "") -> None:
    """Run a program to its end, with `text` as its standard input.

    Raises subprocess.CalledProcessError with its output as text, subprocess.TimeoutExpired, and
    OSError.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run(
            program.guarded(theirs.fileno()),
            input=text,
            cwd=program.cwd,
            env=dict(program.env),
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout_s,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
