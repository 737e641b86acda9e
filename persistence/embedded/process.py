"""One process of a service, from its start to the end of its group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from persistence.embedded import shim
from persistence.embedded.service import Service

LOG_LIMIT_BYTES = 10_000_000
LOG_TAIL_BYTES = 2_000


class ServerProcess:
    """Started by its constructor, from a thread that must outlive it (see shim.command).

    It leads a session of its own: a Ctrl-C in the terminal is for the supervisor, which then
    stops its services in order. `on_exit` is called from another thread when it has ended.
    """

    def __init__(self, service: Service, log_path: Path, on_exit: Callable[[], None]) -> None:
        self._service = service
        self._log_path = log_path
        self._on_exit = on_exit
        with contextlib.ExitStack() as stack:
            lifeline: tuple[int, ...] = ()
            if not shim.HAS_PDEATHSIG:
                read_end, self._lifeline = os.pipe()
                stack.callback(os.close, read_end)
                lifeline = (read_end,)
            _rotate(log_path)
            log = stack.enter_context(log_path.open("ab"))
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                shim.command(service.argv, service.run_as, *lifeline),
                cwd=service.cwd,
                env=dict(service.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=lifeline,
            )
        self._exited = threading.Event()
        self._reaper = threading.Thread(target=self._reap, daemon=True)
        self._reaper.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._popen.returncode if self._exited.is_set() else None

    def end(self) -> None:
        """Ask with the service's own signal, wait, then kill what is left of its group.

        An interrupt ends the wait, not the killing.
        """
        self._popen.send_signal(self._service.stop_signal)
        try:
            self._exited.wait(self._service.grace_s)
        finally:
            # PermissionError is how macOS says that only zombies are left
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._reaper.join()
        if not shim.HAS_PDEATHSIG:
            os.close(self._lifeline)

    def log_tail(self) -> str:
        """The last lines that it wrote, without those of earlier processes."""
        with self._log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()

    def _reap(self) -> None:
        self._popen.wait()
        self._exited.set()
        self._on_exit()


def _rotate(log_path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if log_path.stat().st_size > LOG_LIMIT_BYTES:
            log_path.replace(log_path.with_suffix(".log.1"))
