"""Reports a worker's state to the registry, and carries out its orders: drain, restart. No Ray.

While Postgres is unavailable the last orders stay in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

from restoration.errors import DependencyUnavailable, EngineUnavailable
from restoration.ports.workers import WorkerReports
from restoration.tasks import stop
from restoration.workers import WorkerReport

log = structlog.get_logger(__name__)


class WorkerRegistration:
    """Registers the worker `worker_id`. `undrained` is set unless the worker is to claim no job.

    `make_report` returns a report, given the number of restarts done. `restart` restarts the engine
    when no job is in it, and may raise EngineUnavailable. A report is sent every `every_s` seconds.
    """

    def __init__(
        self,
        registry: WorkerReports,
        worker_id: str,
        make_report: Callable[[int], WorkerReport],
        restart: Callable[[], Awaitable[None]],
        every_s: float,
    ) -> None:
        self._registry = registry
        self._worker_id = worker_id
        self._make_report = make_report
        self._restart = restart
        self._every_s = every_s
        self._restarts_done = 0
        self._restarting: asyncio.Task[None] | None = None
        self.undrained = asyncio.Event()
        self.undrained.set()

    async def run(self) -> NoReturn:
        """Report periodically until cancelled, which also stops a restart that waits."""
        try:
            while True:
                await self.report()
                await asyncio.sleep(self._every_s)
        finally:
            if self._restarting is not None:
                await stop(self._restarting)

    async def report(self) -> None:
        """Report once, and apply the orders that the registry returns. A failure is logged."""
        try:
            orders = await self._registry.report(self._make_report(self._restarts_done))
        except DependencyUnavailable as error:
            log.warning("not_reported", reason=error.message)
            return
        if orders.drained and self.undrained.is_set():
            log.info("worker_drained")
            self.undrained.clear()
        elif not orders.drained and not self.undrained.is_set():
            log.info("worker_undrained")
            self.undrained.set()
        if orders.restarts_asked > self._restarts_done and self._restarting is None:
            self._restarting = asyncio.create_task(self._restart_once(orders.restarts_asked))

    async def leave(self) -> None:
        """Remove the worker from the registry. A failure is logged."""
        try:
            await self._registry.leave(self._worker_id)
        except DependencyUnavailable as error:
            log.warning("not_reported", reason=error.message)

    async def _restart_once(self, asked: int) -> None:
        """Restart the engine once for all the restarts asked for so far."""
        try:
            await self._restart()
        except EngineUnavailable as error:  # the worker's health check handles a broken engine
            log.warning("engine_unavailable", reason=error.message)
        self._restarts_done = asked
        self._restarting = None
