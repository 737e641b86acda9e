"""What a worker's attempts have cost, on its way to the ledger. Plain async code, no Ray.

Written now and then and all at once: a job's end waits for no bookkeeping, and several jobs cost
Postgres one transaction. A worker that is killed takes with it what it has not written yet.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

import structlog

from restoration.errors import DependencyUnavailable
from restoration.jobs import AttemptRef, Job
from restoration.observability.usage import Cost, UsageLedger

log = structlog.get_logger(__name__)


class UsageRecorder:
    """The latest figure of each attempt, until the ledger has it."""

    def __init__(self, ledger: UsageLedger, every_s: float) -> None:
        self._ledger = ledger
        self._every_s = every_s
        self._unwritten: dict[AttemptRef, Cost] = {}

    def charge(self, job: Job, gpu_s: float) -> None:
        """The attempt of `job` has executed for so long in all. Never blocks, never fails."""
        self._unwritten[job.ref] = Cost(job, gpu_s)

    async def run(self) -> NoReturn:
        """Write every so often, for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.write()

    async def write(self) -> None:
        """Give the ledger what it does not have; what it cannot take now it is given again."""
        costs = list(self._unwritten.values())
        if not costs:
            return
        try:
            await self._ledger.record(costs)
        except DependencyUnavailable as error:
            log.warning("usage_not_recorded", attempts=len(costs), reason=error.message)
            return
        # Only now, so that one who is cancelled meanwhile has forgotten nothing.
        for cost in costs:
            if self._unwritten.get(cost.job.ref) is cost:
                del self._unwritten[cost.job.ref]
