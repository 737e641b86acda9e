"""Keeps one service alive: start, readiness, liveness, restart, stop.

One thread does all of it, from the first start to the last exit. It starts every process itself,
because the kernel kills a process bound by PR_SET_PDEATHSIG when the *thread* that started it
ends, and this one ends after its processes. Requests come in as flags and an event that stays
set, so none is lost, whatever the keeper is doing.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from persistence.embedded.process import ServerProcess
from persistence.embedded.service import Service
from restoration.backoff import backoff_s
from restoration.errors import DependencyUnavailable

logger = logging.getLogger(__name__)

FIRST_LOOK_S, LAST_LOOK_S = 0.02, 0.5  # between two readiness probes


@dataclass(frozen=True, slots=True)
class Pace:
    """How often to look, and how patiently to try again."""

    liveness_s: float = 2.0
    # A machine whose cores are all busy answers late: only after this many unanswered probes in
    # a row, each of which may itself take seconds, is a service taken to hang.
    missed_probes: int = 10
    first_backoff_s: float = 0.2
    max_backoff_s: float = 15.0
    steady_s: float = 10.0  # a life this long ends the backing off
    start_attempts: int = 5  # before start-up gives up; later there is no limit

    def backoff_s(self, failures: int) -> float:
        """How long to wait after so many failed lives in a row, 1 or more."""
        return backoff_s(self.first_backoff_s, self.max_backoff_s, failures - 1)


class Keeper:
    """One supervised service; the public methods are for other threads."""

    def __init__(self, service: Service, log_path: Path, pace: Pace) -> None:
        self.service = service
        self.log_path = log_path
        self._pace = pace
        self._thread = threading.Thread(
            target=self._keep, name=f"keeper-{service.name}", daemon=True
        )
        self._life_over = threading.Event()  # the process has ended, or its end was asked for
        self._changed = threading.Condition()  # guards everything below
        self._stop_asked = False
        self._restart_asked = False
        self._process: ServerProcess | None = None
        self._life = 0
        self._ready_life = 0
        self._failures = 0  # failed lives in a row
        self._last_failure = "no attempt has ended yet"

    @property
    def pid(self) -> int | None:
        with self._changed:
            return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the service, once, and return when it is ready.

        Raises DependencyUnavailable, with the end of its log, when it does not get ready.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._ready_life > 0
                    or self._stop_asked
                    or self._failures >= self._pace.start_attempts
                ),
                self.service.start_timeout_s,
            )
            self._demand_ready(life=1)

    def restart(self) -> None:
        """End the process properly and return when another one is ready.

        Raises DependencyUnavailable when none gets ready in time.
        """
        with self._changed:
            wanted = self._life + 1
            self._restart_asked = True
            self._life_over.set()
            self._changed.wait_for(
                lambda: self._ready_life >= wanted or self._stop_asked,
                self.service.grace_s + self.service.start_timeout_s,
            )
            self._demand_ready(life=wanted)

    def stop(self) -> None:
        """End the service and return when its process is gone. May be repeated."""
        with self._changed:
            self._stop_asked = True
            self._life_over.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _demand_ready(self, life: int) -> None:
        if self._ready_life < life:
            why = "it was stopped" if self._stop_asked else self._last_failure
            raise DependencyUnavailable(f"{self.service.name} did not get ready: {why}")

    def _keep(self) -> None:
        while self._next_life_begins():
            began = time.monotonic()
            try:
                failure = self._live()
            except Exception as error:  # supervision outlives whatever goes wrong in one life
                logger.exception("service %s: start failed", self.service.name)
                failure = str(error)
            if failure is not None:
                self._back_off(failure, lasted_s=time.monotonic() - began)

    def _next_life_begins(self) -> bool:
        with self._changed:
            self._life_over.clear()
            self._restart_asked = False
            self._life += 1
            return not self._stop_asked

    def _live(self) -> str | None:
        """One life, from `prepare` to the end of the process: why it failed, if it did."""
        self.service.prepare()
        process = ServerProcess(self.service, self.log_path, on_exit=self._life_over.set)
        self._publish(process)
        try:
            if self._gets_ready():
                self._announce_ready(process)
                self._watch()
            return self._failure(process)
        finally:
            process.end()
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

    def _failure(self, process: ServerProcess) -> str | None:
        with self._changed:
            if self._stop_asked or self._restart_asked:
                return None
        status = process.exit_status
        end = "it does not answer" if status is None else f"it ended with status {status}"
        return f"{end}; the end of {self.log_path}:\n{process.log_tail()}"

    def _back_off(self, failure: str, lasted_s: float) -> None:
        logger.warning("service %s failed: %s", self.service.name, failure)
        with self._changed:
            self._failures = 1 if lasted_s >= self._pace.steady_s else self._failures + 1
            self._last_failure = failure
            wait_s = self._pace.backoff_s(self._failures)
            if not (self._stop_asked or self._restart_asked):
                self._life_over.clear()
            self._changed.notify_all()
        self._life_over.wait(wait_s)

    def _announce_ready(self, process: ServerProcess) -> None:
        logger.info("service %s is ready, pid %d", self.service.name, process.pid)
        with self._changed:
            self._ready_life = self._life
            self._changed.notify_all()

    def _publish(self, process: ServerProcess | None) -> None:
        with self._changed:
            self._process = process
