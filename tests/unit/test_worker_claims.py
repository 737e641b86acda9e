"""The checks of a worker before it takes a job. Its parts are fakes; the worker is real."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from actors import gpu_worker
from actors.execution.attempt import Lease
from actors.gpu_worker import GpuWorker
from restoration.errors import EngineUnavailable
from tests.support.samples import new_job


class Worker(GpuWorker):
    """A worker as after its start, but without Ray. `claims` counts."""

    def __init__(self, start_engine: Callable[[], Awaitable[None]]) -> None:
        self.claims = 0
        self._id = "worker"
        self._workflows = ["restore"]
        self._lease = Lease(5, 60)
        self._ask_store_first = False
        self._standing: Any = SimpleNamespace(drained=False)
        self._engine: Any = SimpleNamespace(start=start_engine)
        self._warmth: Any = SimpleNamespace(
            check=lambda: None, took=lambda _workflow: None, affinity=None
        )
        self._jobs: Any = SimpleNamespace(claim=self._count)

    async def _count(self, *_: object) -> Any:
        self.claims += 1
        return new_job()

    def __del__(self) -> None:  # type: ignore[override] # nobody awaits it here
        """Do nothing: this worker has nothing to stop."""


@pytest.fixture(autouse=True)
def draining(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether Serve has ordered the replica to stop."""
    told = [False]
    monkeypatch.setattr(gpu_worker, "is_draining", lambda: told[0])
    return told


@pytest.mark.drain
async def test_a_worker_that_is_told_to_stop_while_its_engine_starts_takes_no_job(
    draining: list[bool],
) -> None:
    """The operator or Serve may stop it; a start takes minutes, and a job would be handed back."""

    async def drained_meanwhile() -> None:
        ordered._standing.drained = True

    async def stopped_meanwhile() -> None:
        draining[0] = True

    ordered = Worker(drained_meanwhile)
    assert (await ordered._claim(), ordered.claims) == (None, 0)
    stopped = Worker(stopped_meanwhile)
    assert (await stopped._claim(), stopped.claims) == (None, 0)


@pytest.mark.engine_health
async def test_no_job_is_claimed_for_an_engine_that_does_not_start() -> None:
    """The job waits for another worker; with an engine it is claimed."""

    async def start() -> None:
        return None

    async def fail() -> None:
        raise EngineUnavailable("no GPU")

    broken, sound = Worker(fail), Worker(start)
    assert (await broken._claim(), broken.claims) == (None, 0)
    assert await sound._claim() is not None
