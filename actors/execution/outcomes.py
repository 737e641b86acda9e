"""How an attempt's outcome gets into Postgres: one fenced write, insisted on through an outage.

What an error means for the job is decided here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec

from restoration.backoff import backoff_s
from restoration.errors import DependencyUnavailable, EngineUnavailable, RestorationError
from restoration.jobs import Artifact, Failure, Job
from restoration.ports import JobStore

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How attempts back off, in seconds; `record_s` bounds writing an outcome."""

    first_s: float = 0.5
    longest_s: float = 30.0
    record_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        return backoff_s(self.first_s, self.longest_s, failures)


class Outcomes:
    """The ends that an attempt can come to; each returns the job as it is then.

    LeaseLost: the attempt does not own the job. DependencyUnavailable: Postgres stayed away.
    """

    def __init__(self, jobs: JobStore, retry: RetryPolicy) -> None:
        self._jobs = jobs
        self._retry = retry

    async def succeeded(self, job: Job, output: Artifact, timings_s: Mapping[str, float]) -> Job:
        return await self._record(self._jobs.succeed, job.ref, output, timings_s)

    async def stopped(self, job: Job) -> Job:
        """Somebody wanted the attempt to end: nothing is held against the job."""
        return await self._record(self._jobs.release, job.ref, None)

    async def failed(self, job: Job, error: RestorationError) -> Job:
        failure = Failure.of(error)
        if isinstance(error, EngineUnavailable | DependencyUnavailable):
            # Nothing ran, or S3 is away: that says nothing about the job.
            delay_s = self._retry.delay_s(job.attempt - 1)
            return await self._record(self._jobs.release, job.ref, failure, delay_s, charged=False)
        if error.retryable:
            return await self._hand_back(job, failure)
        return await self._record(self._jobs.fail, job.ref, failure)

    async def broke(self, job: Job) -> Job:
        """A defect of ours: what it was is in the log, and is nobody else's business."""
        failure = Failure("internal_error", "the service failed; the attempt was logged")
        return await self._hand_back(job, failure)

    async def _hand_back(self, job: Job, failure: Failure) -> Job:
        delay_s = self._retry.delay_s(job.failed_attempts)
        return await self._record(self._jobs.release, job.ref, failure, delay_s)

    async def _record(
        self, write: Callable[P, Awaitable[Job]], *args: P.args, **kwargs: P.kwargs
    ) -> Job:
        """Write an outcome: also when the caller is cancelled meanwhile, who waits for it then."""
        writing = asyncio.create_task(self._insist(write, *args, **kwargs))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            raise

    async def _insist(
        self, write: Callable[P, Awaitable[Job]], *args: P.args, **kwargs: P.kwargs
    ) -> Job:
        """Write through an outage of Postgres.

        A write that was committed although its answer was lost is repeated harmlessly: `succeed`
        is idempotent, the others then raise LeaseLost.
        """
        deadline = time.monotonic() + self._retry.record_s
        while True:
            try:
                return await write(*args, **kwargs)
            except DependencyUnavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(self._retry.first_s)
