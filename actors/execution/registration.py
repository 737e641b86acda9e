"""Reports a worker's state to the registry, and carries out its orders: drain, restart. No Ray.

While Postgres is unavailable the last orders stay in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn

import structlog

from restoration.errors import DependencyUnavailable, EngineUnavailable
from restoration.ports import WorkerRegistry
from restoration.tasks import stop
from restoration.workers import WorkerOrders, WorkerReport

log = structlog.get_logger(__name__)


class WorkerRegistration:
    """Registers one worker, and keeps its orders.

    `look` returns a report, given the number of restarts done. `restart` restarts the engine when
    no job is in it, and may raise EngineUnavailable. A report is sent every `every_s` seconds.
    """

    def __init__(
        self,
        registry: WorkerRegistry,
        look: Callable[[int], WorkerReport],
        restart: Callable[[], Awaitable[None]],
        every_s: float,
    ) -> None:
        self._registry = registry
        self._look = look
        self._restart = restart
        self._every_s = every_s
        self._orders = WorkerOrders()
        self._restarts_done = 0
        self._undrained = asyncio.Event()
        self._undrained.set()
        self._restarting: asyncio.Task[None] | None = None

    @property
    def drained(self) -> bool:
        return self._orders.drained

    async def admitted(self, within_s: float) -> bool:
        """Wait up to `within_s` seconds while drained. Return whether the worker may claim."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._undrained.wait()
        return not self.drained

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
            orders = await self._registry.report(self._look(self._restarts_done))
        except DependencyUnavailable as error:
            log.warning("not_reported", reason=error.message)
            return
        if orders.drained != self.drained:
            log.info("worker_drained" if orders.drained else "worker_undrained")
        self._orders = orders
        (self._undrained.clear if orders.drained else self._undrained.set)()
        if orders.restarts_asked > self._restarts_done and self._restarting is None:
            self._restarting = asyncio.create_task(self._obey(orders.restarts_asked))

    async def leave(self) -> None:
        """Remove the worker from the registry. A failure is logged."""
        try:
            await self._registry.leave(self._look(self._restarts_done).id)
        except DependencyUnavailable as error:
            log.warning("not_reported", reason=error.message)

    async def _obey(self, asked: int) -> None:
        """Restart the engine once for all the restarts asked for so far."""
        try:
            await self._restart()
        except EngineUnavailable as error:  # the worker's health check handles a broken engine
            log.warning("engine_unavailable", reason=error.message)
        self._restarts_done = asked
        self._restarting = None
