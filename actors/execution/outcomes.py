"""Records an attempt's outcome in Postgres: one fenced write, retried through an outage.

This module alone maps each error to a call of the job store.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from restoration.backoff import backoff_s
from restoration.errors import (
    DependencyUnavailable,
    EngineInterrupted,
    EngineUnavailable,
    RestorationError,
)
from restoration.jobs import Artifact, Failure, Job
from restoration.ports.jobs import WorkerQueue

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Backoff between attempts, and `record_s`, the time for writing an outcome. Seconds."""

    first_s: float = 0.5
    longest_s: float = 30.0
    record_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        return backoff_s(self.first_s, self.longest_s, failures)


class Outcomes:
    """Records the outcomes of attempts. Each method returns the job as updated.

    Each raises LeaseLost if the attempt does not own the job, and DependencyUnavailable if
    Postgres stays unavailable for `RetryPolicy.record_s`.
    """

    def __init__(self, jobs: WorkerQueue, retry: RetryPolicy) -> None:
        self._jobs = jobs
        self._retry = retry

    async def succeeded(self, job: Job, output: Artifact, timings_s: Mapping[str, float]) -> Job:
        """Record the stored result, and the seconds of each stage."""
        return await self._record(lambda: self._jobs.succeed(job.ref, output, timings_s))

    async def stopped(self, job: Job) -> Job:
        """Release the job after a cancellation or a worker's shutdown, without a failure."""
        return await self._record(lambda: self._jobs.release(job.ref, None))

    async def failed(self, job: Job, error: Exception) -> Job:
        """Release the job for another attempt if the error may pass; otherwise fail it.

        An error that is no RestorationError is a bug of the service: its details are logged, and
        not in the job.
        """
        match error:
            case EngineInterrupted():
                return await self.stopped(job)
            case EngineUnavailable() | DependencyUnavailable():
                # Nothing ran, or S3 is unavailable: neither is the job's fault, so no charge.
                log.warning("attempt_failed", code=error.code, reason=error.message)
                failure, delay_s = Failure.of(error), self._retry.delay_s(job.attempt - 1)
                return await self._record(
                    lambda: self._jobs.release(job.ref, failure, delay_s, charged=False)
                )
            case RestorationError():
                log.warning("attempt_failed", code=error.code, reason=error.message)
                failure = Failure.of(error)
                if not error.retryable:
                    return await self._record(lambda: self._jobs.fail(job.ref, failure))
            case _:
                log.error("attempt_broke", exc_info=error)
                failure = Failure("internal_error", "the service failed; the attempt was logged")
        delay_s = self._retry.delay_s(job.failed_attempts)
        return await self._record(lambda: self._jobs.release(job.ref, failure, delay_s))

    async def _record(self, write: Callable[[], Awaitable[Job]]) -> Job:
        """Write an outcome. Repeat it while Postgres is unavailable, for `record_s` seconds.

        Repeating a committed write whose response was lost is safe: `succeed` is idempotent, and
        the others then raise LeaseLost.
        """
        through_outage = AsyncRetrying(
            retry=retry_if_exception_type(DependencyUnavailable),
            wait=wait_fixed(self._retry.first_s),
            stop=stop_after_delay(self._retry.record_s),
            reraise=True,
        )

        async def call() -> Job:  # tenacity awaits coroutine functions only
            return await write()

        return await through_outage(call)
