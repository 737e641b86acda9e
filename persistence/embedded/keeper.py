"""Supervise one service: start, readiness, liveness, and stop.

One thread does all of this. The request to stop is a flag and an event that stays set, so that it
is not lost.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from persistence.embedded.service import Service
from restoration.backoff import backoff_s
from restoration.errors import DependencyUnavailable
from restoration.processes.child import LoggedProcess, Program

logger = logging.getLogger(__name__)

FIRST_LOOK_S, LAST_LOOK_S = 0.02, 0.5  # first and longest delay between readiness probes


@dataclass(frozen=True, slots=True)
class Pace:
    """Intervals of the liveness probes, and delays and limits of restarts."""

    liveness_s: float = 2.0
    # A service counts as hung after this many failed probes in a row. Each probe may take seconds,
    # because a machine with all cores busy answers late.
    missed_probes: int = 10
    first_backoff_s: float = 0.2
    max_backoff_s: float = 15.0
    steady_s: float = 10.0  # a process that ran this long resets the backoff
    start_attempts: int = 5  # failures before `start` gives up; restarts have no limit

    def backoff_s(self, failures: int) -> float:
        """Return the delay after `failures` failed processes in a row, at least 1."""
        return backoff_s(self.first_backoff_s, self.max_backoff_s, failures - 1)


class Keeper:
    """One supervised service. Other threads call its public methods."""

    def __init__(self, service: Service, log_path: Path, pace: Pace) -> None:
        self.service = service
        self.log_path = log_path
        self._pace = pace
        self._thread = threading.Thread(
            target=self._keep, name=f"keeper-{service.name}", daemon=True
        )
        self._life_over = threading.Event()  # the process has ended, or must end
        self._changed = threading.Condition()  # guards all attributes below
        self._stop_asked = False
        self._was_ready = False
        self._process: LoggedProcess | None = None
        self._failures = 0  # failed processes in a row
        self._last_failure = "no attempt has ended yet"

    @property
    def pid(self) -> int | None:
        with self._changed:
            return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the service and wait until it is ready. Call it once.

        Raises DependencyUnavailable, with the end of its log, if it does not become ready.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._was_ready
                    or self._stop_asked
                    or self._failures >= self._pace.start_attempts
                ),
                self.service.start_timeout_s,
            )
            if not self._was_ready:
                why = "it was stopped" if self._stop_asked else self._last_failure
                raise DependencyUnavailable(f"{self.service.name} did not become ready: {why}")

    def stop(self) -> None:
        """Stop the service and wait until its process has ended. Idempotent."""
        with self._changed:
            self._stop_asked = True
            self._life_over.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        while True:
            with self._changed:
                if self._stop_asked:
                    return
                self._life_over.clear()
            began = time.monotonic()
            try:
                failure = self._live()
            except Exception as error:  # no failure of one process may end the supervision
                logger.exception("service %s: start failed", self.service.name)
                failure = str(error)
            if failure is not None:
                self._back_off(failure, lasted_s=time.monotonic() - began)

    def _live(self) -> str | None:
        """Run one process, from `prepare` to its end. Return the reason if it failed, else None."""
        self.service.prepare()
        program = Program(
            argv=self.service.argv,
            cwd=self.service.cwd,
            env=self.service.env,
            account=self.service.run_as,
            stop_signal=self.service.stop_signal,
        )
        process = LoggedProcess(program, self.log_path, lambda _exit: self._life_over.set())
        self._publish(process)
        try:
            if self._gets_ready():
                logger.info("service %s is ready, pid %d", self.service.name, process.pid)
                with self._changed:
                    self._was_ready = True
                    self._changed.notify_all()
                self._watch()
            with self._changed:
                if self._stop_asked:
                    return None
            how = process.exit or "does not respond"
            return f"it {how}; the end of {self.log_path}:\n{process.log_tail()}"
        finally:
            process.end(self.service.grace_s)
            self._publish(None)

    def _gets_ready(self) -> bool:
        deadline = time.monotonic() + self.service.start_timeout_s
        look_s = FIRST_LOOK_S
        while time.monotonic() < deadline and not self._life_over.wait(look_s):
            if self.service.probe():
                self.service.initialise()
                return True
            look_s = min(1.5 * look_s, LAST_LOOK_S)
        return False

    def _watch(self) -> None:
        missed = 0
        while missed < self._pace.missed_probes:
            if self._life_over.wait(self._pace.liveness_s):
                return
            missed = 0 if self.service.probe() else missed + 1

    def _back_off(self, failure: str, lasted_s: float) -> None:
        logger.warning("service %s failed: %s", self.service.name, failure)
        with self._changed:
            self._failures = 1 if lasted_s >= self._pace.steady_s else self._failures + 1
            self._last_failure = failure
            wait_s = self._pace.backoff_s(self._failures)
            if not self._stop_asked:
                self._life_over.clear()
            self._changed.notify_all()
        self._life_over.wait(wait_s)

    def _publish(self, process: LoggedProcess | None) -> None:
        with self._changed:
            self._process = process
