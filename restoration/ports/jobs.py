"""The ports to the store of jobs, one for each of its readers.

The store is authoritative. Each change of a job is one transaction; methods that change many jobs
may use several. A method that takes an AttemptRef is fenced: it raises LeaseLost if that attempt
does not own the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from restoration.affinity import Affinity
from restoration.jobs import (
    Artifact,
    AttemptRef,
    Failure,
    Job,
    JobPage,
    JobStatus,
    NewJob,
)
from restoration.limits.quotas import Quotas
from restoration.scaling import Demand
from restoration.webhooks.messages import Delivery


class JobSubmissions(Protocol):
    """Jobs as a submission records them."""

    async def insert(self, job: NewJob, quotas: Quotas | None = None) -> tuple[Job, bool]:
        """Record a queued job, notify the dispatcher and return (job, True).

        If the owner has used the idempotency key already, return (the earlier job, False), or raise
        IdempotencyConflict if the request digests differ. The same holds for the id, which is that
        of the upload if the job has one, with UploadUsed. A second retry of one job returns the
        first in the same way. Raises QueueFull if too many jobs wait, StorageFull if too much would
        be stored.

        `quotas`, by default the store's own, also set how many of the owner's jobs may run at a
        time from now on; claims pass over the others. A retry without quotas leaves that limit
        unchanged. A job with a reused result is recorded as succeeded, without a notification.
        """

    async def find_by_key(self, owner: str, idempotency_key: str) -> Job | None:
        """Return the job of this idempotency key, or None if the key is unused or expired."""

    async def check_room(
        self, owner: str, quotas: Quotas | None = None, more_bytes: int = 0
    ) -> None:
        """Raise QueueFull or StorageFull if `insert` would, with `more_bytes` more stored.

        Call it before an upload is stored.
        """

    async def get(self, job_id: UUID, owner: str | None = None) -> Job:
        """Return the job. Raises JobNotFound; with `owner`, also for another owner's job."""

    async def find_result(self, job: NewJob) -> Job | None:
        """Return the newest job whose stored result answers `job` too (see `restoration.reuse`)."""


class JobAccess(Protocol):
    """Jobs as their clients read and cancel them."""

    async def get(self, job_id: UUID, owner: str | None = None) -> Job:
        """Return the job. Raises JobNotFound; with `owner`, also for another owner's job."""

    async def find(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        """Return those of the jobs that exist, in any order."""

    async def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        """Return those of the jobs that have ended."""

    async def list(
        self,
        owner: str,
        statuses: Sequence[JobStatus] = (),
        cursor: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        """Return a page of the owner's jobs, newest first; no statuses means all.

        Raises InvalidRequest if `cursor` is not one of this list.
        """

    async def request_cancel(self, job_id: UUID, owner: str | None = None) -> Job:
        """Cancel a waiting job at once, or ask the worker of a running one to stop. Idempotent."""

    async def deliveries(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Delivery]:
        """Return the webhook deliveries of those jobs that have ended and have a webhook URL.

        A delivery is recorded in the transaction that ends its job.
        """

    async def ping(self) -> None: ...


class WorkerQueue(Protocol):
    """The queue as a GPU worker sees it."""

    async def claim(
        self,
        worker: str,
        lease_s: float,
        workflows: Sequence[str],
        affinity: Affinity | None = None,
    ) -> Job | None:
        """Claim the first waiting job of these workflows for `worker`; return None if none waits.

        A workflow is a name, for all versions, or the result of `versioned`, for one version.

        Interactive jobs come before batch jobs; within a class owners take turns, each with its
        oldest job. The worker's `affinity` reorders the first few of them.
        """

    async def heartbeat(self, ref: AttemptRef, lease_s: float) -> JobStatus:
        """Extend the lease. Return RUNNING, or CANCELLING if the worker must stop the job."""

    async def succeed(
        self, ref: AttemptRef, output: Artifact, timings_s: Mapping[str, float]
    ) -> Job:
        """End the job as succeeded. Idempotent for the same attempt."""

    async def fail(self, ref: AttemptRef, failure: Failure) -> Job:
        """End the job as failed, because another attempt would fail the same way."""

    async def release(
        self,
        ref: AttemptRef,
        failure: Failure | None,
        delay_s: float = 0,
        *,
        charged: bool = True,
    ) -> Job:
        """Hand the job back, to be claimed after `delay_s`, by another worker if possible.

        If there is a failure and it is `charged`, the attempt counts as failed, and the job fails
        at `max_attempts`. A job that was being cancelled ends as cancelled.
        """


class LeaderQueue(Protocol):
    """The queue as the leading dispatcher sees it."""

    async def waiting(self, limit: int) -> Sequence[AttemptRef]:
        """Return up to `limit` jobs that could be claimed now, each with its next attempt.

        The next job to claim comes first. The rest are grouped by owner, not by order of claims.
        """

    async def demand(self) -> Demand:
        """Return the numbers of waiting and running jobs of all owners.

        For an owner with a limit on running jobs, at most as many jobs of each class count as
        waiting as the limit lets start.
        """

    async def reclaim(self, worker: str | None = None) -> Sequence[Job]:
        """Release and return the jobs whose lease has expired, or all jobs of a dead `worker`."""

    async def expire(self) -> Sequence[Job]:
        """Fail jobs that did not start by their queue deadline, and return them.

        Each call handles a bounded number.
        """

    async def promote(self) -> None:
        """Let batch jobs that have waited for `aging_s` take turns with interactive ones.

        Call it about once a second: a promotion is at most that late. `aging_s` is in QueuePolicy.
        """
