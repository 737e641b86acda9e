"""One process of a service, from its start to the end of its process group."""

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
    """A process that its constructor starts, in a thread that must outlive it (see shim.command).

    It leads its own session, so that a Ctrl-C in the terminal reaches only the supervisor, which
    stops its services in order. `on_exit` is called in another thread when the process has ended.
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
        """Exit status; None while it runs, and the negative signal number if one ended it."""
        return self._popen.returncode if self._exited.is_set() else None

    def end(self) -> None:
        """Send the service's stop signal, wait for `grace_s`, then kill the rest of its group.

        A KeyboardInterrupt ends the wait, but the group is killed all the same.
        """
        self._popen.send_signal(self._service.stop_signal)
        try:
            self._exited.wait(self._service.grace_s)
        finally:
            # macOS raises PermissionError if only zombies are left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._reaper.join()
        if not shim.HAS_PDEATHSIG:
            os.close(self._lifeline)

    def log_tail(self) -> str:
        """Return the end of its output, up to LOG_TAIL_BYTES, without that of earlier processes."""
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
