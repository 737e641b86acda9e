"""The process of `serve_app.local.ray`, started, awaited and ended by `restore up`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn, Self

from restoration.errors import DependencyUnavailable
from restoration.processes.child import LoggedProcess, Program
from serve_app.local.processes import end_all, orphans_of
from serve_app.local.record import (
    FAILED_STATUS,
    LOST_STATUS,
    RayReport,
    StackOptions,
    find_report,
    ray_session,
    report_path,
)

PROGRAM = (sys.executable, "-m", "serve_app.local.ray")
START_TIMEOUT_S = 600.0
STOP_MARGIN_S = 30.0  # for Ray to stop, after the jobs
_POLL_S = 0.1


class RayLost(Exception):
    """Ray ended, or did not start, for a reason that a new Ray may not meet."""


class RayProcess:
    """A context manager that starts Ray and the service, and ends all processes they started."""

    def __init__(self, state_dir: Path, options: StackOptions, drain_s: float) -> None:
        self._state_dir = state_dir
        self._options = options
        self._drain_s = drain_s
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        report = report_path(self._state_dir)
        report.unlink(missing_ok=True)
        log_path = self._state_dir / "logs" / "ray.log"
        log_path.parent.mkdir(mode=0o700, exist_ok=True)
        argv = [*PROGRAM, "--workers", str(self._options.workers)]
        argv += ["--port", str(self._options.port), "--report", str(report)]
        # paths in the settings may be relative
        program = Program(argv=argv, cwd=Path.cwd(), env=os.environ)
        self._log_path = log_path
        self._process = LoggedProcess(program, log_path, lambda _exit: self._ended.set())
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._process.end(self._drain_s + STOP_MARGIN_S)
        finally:
            end_all(partial(orphans_of, self._state_dir, ray_session(self._state_dir)))

    def wait_until_ready(self, answers: Callable[[], bool]) -> RayReport:
        """Wait until every replica is ready and `answers()` is true; return Ray's report.

        Raises RayLost if Ray did not start, and DependencyUnavailable if the service did not, or
        not within START_TIMEOUT_S.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._ended.wait(_POLL_S):
                self._raise_reason()
            report = find_report(self._state_dir)
            if report is not None and report.ready and answers():
                return report
        raise DependencyUnavailable(
            f"the service was not ready within {START_TIMEOUT_S:.0f} s; see {self._log_path}"
        )

    def wait_until_lost(self) -> NoReturn:
        """Wait until Ray ends.

        Raises RayLost, or DependencyUnavailable if the service failed for a lasting reason.
        """
        self._ended.wait()
        self._raise_reason()

    def _raise_reason(self) -> NoReturn:
        how = self._process.exit
        status = how.returncode if how else None
        lines = self._process.log_tail().splitlines() or [""]
        errors = [line for line in lines if line.startswith("error: ")]
        if status == FAILED_STATUS:
            reason = (errors or lines)[-1].removeprefix("error: ")
            raise DependencyUnavailable(f"{reason}; see {self._log_path}")
        if status == LOST_STATUS and errors:
            raise RayLost(errors[-1].removeprefix("error: "))
        raise RayLost(f"its process {how}; see {self._log_path}")
