"""What a worker reports of itself, and what it has been told to do. Plain async code, no Ray.

Without Postgres no report arrives and no order is learnt; those that are known hold.
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
    """`look` makes a report, given how many restarts are done; `restart` starts the engine anew
    when no job is in it, and may raise EngineUnavailable."""

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
        """Whether the worker may claim, after at most so long of waiting to be undrained."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._undrained.wait()
        return not self.drained

    async def run(self) -> NoReturn:
        """Report and obey, for ever; cancelled, the engine is left as it is."""
        try:
            while True:
                await self.report()
                await asyncio.sleep(self._every_s)
        finally:
            if self._restarting is not None:
                await stop(self._restarting)

    async def report(self) -> None:
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
        try:
            await self._registry.leave(self._look(self._restarts_done).id)
        except DependencyUnavailable as error:
            log.warning("not_reported", reason=error.message)

    async def _obey(self, asked: int) -> None:
        """Several orders that came meanwhile are one restart."""
        try:
            await self._restart()
        except EngineUnavailable as error:  # the worker's health check sees to it from here
            log.warning("engine_unavailable", reason=error.message)
        self._restarts_done = asked
        self._restarting = None
