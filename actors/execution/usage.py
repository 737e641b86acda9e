"""Records the GPU time of a worker's attempts in the usage ledger. Plain async code, no Ray.

Costs are written periodically in one transaction, so that no job waits for it. The costs that a
killed worker has not written are lost.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

import structlog

from actors.observability.timings import Stopwatch
from restoration.errors import DependencyUnavailable
from restoration.jobs import AttemptRef, Job
from restoration.observability.usage import Cost, UsageLedger

log = structlog.get_logger(__name__)


class UsageRecorder:
    """An observer that buffers the latest cost of each attempt until it is written."""

    def __init__(self, ledger: UsageLedger, every_s: float) -> None:
        self._ledger = ledger
        self._every_s = every_s
        self._unwritten: dict[AttemptRef, Cost] = {}

    def executed(self, job: Job, gpu_s: float, more_s: float) -> None:
        if gpu_s:
            self._unwritten[job.ref] = Cost(job, gpu_s)

    def ended(self, job: Job, watch: Stopwatch, ended: Job | None) -> None: ...

    async def run(self) -> NoReturn:
        """Write the costs periodically until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.write()

    async def write(self) -> None:
        """Write all unwritten costs. If Postgres is unavailable they are kept for the next call."""
        costs = list(self._unwritten.values())
        if not costs:
            return
        try:
            await self._ledger.record(costs)
        except DependencyUnavailable as error:
            log.warning("usage_not_recorded", attempts=len(costs), reason=error.message)
            return
        # Removed only after the write, so that a cancellation loses nothing.
        for cost in costs:
            if self._unwritten.get(cost.job.ref) is cost:
                del self._unwritten[cost.job.ref]
