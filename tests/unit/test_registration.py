"""A worker's reports, and its reaction to orders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from actors.execution.registration import WorkerRegistration
from restoration.errors import EngineUnavailable
from restoration.workers import EngineState, WorkerReport
from tests.fakes.workers import MemoryWorkerRegistry
from tests.support.polling import until

EVERY_S = 0.005


async def _holds(condition: Callable[[], bool]) -> None:
    async def look() -> bool:
        return condition()

    await until(look)


@dataclass
class Worker:
    registry: MemoryWorkerRegistry = field(default_factory=MemoryWorkerRegistry)
    restarts: int = 0
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    trouble: EngineUnavailable | None = None

    def __post_init__(self) -> None:
        self.registration = WorkerRegistration(self.registry, "w", self.look, self.restart, EVERY_S)
        self.task = asyncio.create_task(self.registration.run())

    def look(self, restarts_done: int) -> WorkerReport:
        url = "http://127.0.0.1:8188"
        return WorkerReport("w", "n", url, EngineState.READY, 1, (), restarts_done)

    async def restart(self) -> None:
        await self.empty.wait()
        self.restarts += 1
        if self.trouble is not None:
            raise self.trouble

    @property
    def done(self) -> int:
        return self.registry.states["w"].report.restarts_done


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker()
    await _holds(lambda: bool(worker.registry.states))
    yield worker
    worker.task.cancel()
    await asyncio.gather(worker.task, return_exceptions=True)


@pytest.mark.fleet
async def test_a_worker_is_drained_until_it_is_undrained(worker: Worker) -> None:
    """A ticket that waits for it is then served at once."""
    assert worker.registration.undrained.is_set()
    await worker.registry.drain("w", drained=True)
    await _holds(lambda: not worker.registration.undrained.is_set())
    waiting = asyncio.create_task(worker.registration.undrained.wait())
    await worker.registry.drain("w", drained=False)
    assert await waiting


@pytest.mark.fleet
async def test_orders_hold_while_postgres_is_away(worker: Worker) -> None:
    """A drained worker does not start to claim because Postgres is away."""
    await worker.registry.drain("w", drained=True)
    await _holds(lambda: not worker.registration.undrained.is_set())
    worker.registry.down = True
    await worker.registration.report()
    assert not worker.registration.undrained.is_set()
    assert not worker.task.done()


@pytest.mark.fleet
async def test_an_order_to_restart_is_obeyed_once(worker: Worker) -> None:
    """An order holds for any number of reports; a later one is another restart."""
    await worker.registry.restart_engine("w")
    for _ in range(3):
        await worker.registration.report()
    assert worker.done == 0
    worker.empty.set()
    await _holds(lambda: worker.done == 1)
    assert worker.restarts == 1
    await worker.registry.restart_engine("w")
    await _holds(lambda: worker.done == 2)
    assert worker.restarts == 2


@pytest.mark.fleet
async def test_an_engine_that_does_not_come_back_ends_no_report(worker: Worker) -> None:
    """The health check handles the engine; the order counts as obeyed."""
    worker.trouble = EngineUnavailable("it exits at once")
    worker.empty.set()
    await worker.registry.restart_engine("w")
    await _holds(lambda: worker.done == 1)
    assert not worker.task.done()
