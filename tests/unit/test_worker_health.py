"""A GPU worker's answer to Serve's health check: one that raises is replaced."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from actors.gpu_worker import GpuWorker
from restoration.errors import DependencyUnavailable, EngineUnavailable

NO_DEVICE = EngineUnavailable("no such device")


@dataclass
class Engine:
    """Dead or well; `broken` is the error of its last start, after too many that failed."""

    well: bool = True
    broken: EngineUnavailable | None = None
    trouble: EngineUnavailable | None = None  # of its next starts
    starts: int = 0

    async def healthy(self) -> bool:
        return self.well

    async def start(self) -> None:
        self.starts += 1
        if self.trouble is not None:
            raise self.trouble
        self.well = True


@dataclass
class Worker:
    """The parts of a GPU worker that the check uses, without Ray."""

    engine: Engine = field(default_factory=Engine)
    idle: bool = True
    background: DependencyUnavailable | None = None  # how one of its tasks ended, if it did

    async def check_health(self) -> None:
        tasks = [asyncio.create_task(_ends(error)) for error in (None, self.background)]
        await asyncio.sleep(0)
        worker: Any = SimpleNamespace(
            _engine=self.engine,
            _pipeline=SimpleNamespace(idle=self.idle),
            _background=tasks,
        )
        try:
            await GpuWorker.check_health(worker)
        finally:
            for task in tasks:
                task.cancel()


async def _ends(error: DependencyUnavailable | None) -> None:
    if error is not None:
        raise error
    await asyncio.Event().wait()


@pytest.mark.engine_health
@pytest.mark.parametrize("idle", [True, False])
async def test_a_worker_whose_engine_cannot_start_asks_to_be_replaced(idle: bool) -> None:
    """It gives the reason, also while a job waits for a start; the engine is not started again."""
    worker = Worker(Engine(well=False, broken=NO_DEVICE), idle)
    with pytest.raises(EngineUnavailable, match="no such device"):
        await worker.check_health()
    assert worker.engine.starts == 0


@pytest.mark.engine_health
async def test_a_dead_engine_is_started_between_jobs() -> None:
    """A worker that restarts its engine is well, and stays."""
    worker = Worker(Engine(well=False))
    await worker.check_health()
    assert (worker.engine.well, worker.engine.starts) == (True, 1)
    await worker.check_health()
    assert worker.engine.starts == 1


@pytest.mark.engine_health
async def test_a_start_that_fails_makes_the_worker_unwell() -> None:
    """The check reports it; the next one tries again, until the engine counts as broken."""
    worker = Worker(Engine(well=False, trouble=NO_DEVICE))
    for starts in (1, 2):
        with pytest.raises(EngineUnavailable, match="no such device"):
            await worker.check_health()
        assert worker.engine.starts == starts
    worker.engine.trouble = None
    await worker.check_health()


@pytest.mark.engine_health
async def test_an_engine_with_a_job_is_left_to_the_job() -> None:
    """A busy engine may be slow to answer, so the check neither pings nor starts it."""
    worker = Worker(Engine(well=False), idle=False)
    await worker.check_health()
    assert worker.engine.starts == 0


@pytest.mark.engine_health
async def test_a_worker_with_a_task_that_ended_is_replaced() -> None:
    """Even with a healthy engine, its reports, costs or progress would be missing."""
    worker = Worker(background=DependencyUnavailable("gone for good"))
    with pytest.raises(DependencyUnavailable, match="gone for good"):
        await worker.check_health()
