"""The ports to Postgres, S3 and Redis.

Every implementation raises only errors of `restoration.errors`: DependencyUnavailable if a
dependency cannot be reached. Each port has a contract suite in tests/contracts. The port to
ComfyUI is `restoration.engine_port`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from restoration.affinity import Affinity
from restoration.batches import BatchItem, BatchPage, JobBatch, NewBatch
from restoration.events import JobEvent
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
from restoration.limits.rates import Rate
from restoration.scaling import Demand
from restoration.webhooks.messages import Delivery
from restoration.workers import QueueState, WorkerOrders, WorkerReport, WorkerSnapshot, WorkerState


class JobStore(Protocol):
    """The authoritative store of jobs.

    Each change of a job is one transaction; methods that change many jobs may use several. A method
    that takes an AttemptRef is fenced: it raises LeaseLost if that attempt does not own the job.
    """

    async def insert(self, job: NewJob, quotas: Quotas | None = None) -> tuple[Job, bool]:
        """Record a queued job, notify the dispatcher and return (job, True).

        If the owner has used the idempotency key already, return (the earlier job, False), or raise
        IdempotencyConflict if the request digests differ. A second retry of one job returns the
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

    async def request_cancel(self, job_id: UUID, owner: str | None = None) -> Job:
        """Cancel a waiting job at once, or ask the worker of a running one to stop. Idempotent."""

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

    async def waiting(self, limit: int) -> Sequence[AttemptRef]:
        """Return up to `limit` jobs that could be claimed now, each with its next attempt.

        The next job to claim comes first. The rest are grouped by owner, not by order of claims.
        """

    async def demand(self) -> Demand:
        """Return the numbers of waiting and running jobs of all owners.

        For an owner with a limit on running jobs, at most as many jobs of each class count as
        waiting as the limit lets start.
        """

    async def deliveries(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Delivery]:
        """Return the webhook deliveries of those jobs that have ended and have a webhook URL.

        A delivery is recorded in the transaction that ends its job.
        """

    async def ping(self) -> None: ...


class BatchStore(Protocol):
    """The authoritative store of batches, whose jobs are in the JobStore.

    Methods raise BatchNotFound for a missing batch and, with `owner`, for another owner's.
    """

    async def insert(
        self, batch: NewBatch, jobs: Sequence[NewJob], quotas: Quotas | None = None
    ) -> tuple[JobBatch, bool]:
        """Record the batch and all its jobs in one transaction, and return (batch, True).

        Each job carries the batch's id. If the owner has used the idempotency key already, return
        (the earlier batch, False), or raise IdempotencyConflict if the request digests differ.
        `quotas` work as in `JobStore.insert`.
        """

    async def find_by_key(self, owner: str, idempotency_key: str) -> JobBatch | None: ...

    async def get(self, batch_id: UUID, owner: str | None = None) -> JobBatch: ...

    async def find(self, batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        """Return those of the batches that exist, in any order."""

    async def list(self, owner: str, cursor: str | None = None, limit: int = 50) -> BatchPage:
        """Return a page of batches, newest first. Raises InvalidRequest for a foreign cursor."""

    async def items(
        self, batch_id: UUID, owner: str | None = None, first: int = 0, limit: int = 1000
    ) -> Sequence[BatchItem]:
        """Return up to `limit` photos in the order of their index, starting at index `first`."""

    async def request_cancel(self, batch_id: UUID, owner: str | None = None) -> JobBatch:
        """Cancel each job of the batch as `JobStore.request_cancel` does. Idempotent."""


@dataclass(frozen=True, slots=True)
class NewUpload:
    """A direct upload that a client announces. `sha256` is lower-case hex, or None if unknown."""

    content_type: str
    size_bytes: int
    sha256: str | None = None


class UploadStore(Protocol):
    """Direct uploads without a job yet. An upload ends when JobStore records a job with its id."""

    async def begin(
        self,
        upload_id: UUID,
        owner: str,
        size_bytes: int,
        lifetime_s: float,
        quotas: Quotas | None = None,
    ) -> None:
        """Count `size_bytes` as stored for `owner` until a job is made or `lifetime_s` has passed.

        `quotas` default to the store's own. Raises QueueFull if no job could be queued now, and
        StorageFull if too many bytes would be stored or announced.
        """

    async def size_of(self, upload_id: UUID, owner: str) -> int | None:
        """Return the announced size in bytes, or None if the owner has no such upload."""


@dataclass(frozen=True, slots=True)
class UploadLink:
    """A presigned URL for a PUT with exactly these headers, valid until `expires_at`."""

    url: str
    headers: Mapping[str, str]
    expires_at: datetime


class BlobStore(Protocol):
    """Object storage. `get` returns exactly the bytes that were `put`."""

    async def put(self, key: str, data: bytes, content_type: str) -> Artifact: ...

    async def get(self, artifact: Artifact) -> bytes:
        """Return the bytes. Raises ArtifactCorrupt if size or sha256 differ, or it is missing."""

    async def read(self, artifact: Artifact, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end` (exclusive), which must lie in the artifact.

        Raises ArtifactCorrupt if the size differs or the object is gone. The sha256 covers the
        whole object, so a part is not verified.
        """

    async def copy(self, artifact: Artifact, key: str) -> Artifact:
        """Copy the bytes to `key`, as if by `put`. Raises the errors of `get`."""

    async def delete(self, key: str) -> None:
        """Delete the object. A missing object is not an error."""

    async def delete_many(self, keys: Sequence[str]) -> None:
        """Delete any number of objects. Missing objects are not errors."""

    def list(self, prefix: str, older_than: datetime) -> AsyncIterator[Sequence[str]]:
        """Yield pages of the keys with `prefix` that were last written before `older_than`."""

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        """Return a URL that serves the object without a token for `lifetime_s` seconds."""

    async def upload_link(self, key: str, upload: NewUpload, lifetime_s: int) -> UploadLink:
        """Return a link with which its holder can write the object at `key`, and no other."""

    async def fetch(self, key: str, max_bytes: int) -> bytes | None:
        """Return unverified bytes, at most `max_bytes` + 1, or None if there is no object."""

    async def ping(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StampedEvent:
    """An event with its id in the job's stream. Ids sort in the order of publication.

    `row` is the committed job, if the event is its end and was published by `conclude`.
    """

    id: str
    event: JobEvent
    row: Job | None = None


class StatusBoard(Protocol):
    """Live progress, best effort. Its loss affects progress bars but no job."""

    async def publish(self, events: Sequence[tuple[UUID, JobEvent]]) -> None: ...

    async def conclude(self, job: Job) -> None:
        """Publish the end of `job`, given as committed.

        Followers receive the row with the event, unless it is too large.
        """

    async def latest(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[JobEvent]]:
        """Return the newest event of each type, for each of the jobs that has any."""

    def follow(self, job_id: UUID) -> AsyncIterator[StampedEvent]:
        """Yield the stored events, then new ones without end. Outages are waited out."""

    async def ping(self) -> None: ...


class RateLimiter(Protocol):
    """Counts requests per owner over all replicas. Losing the counts has no other effect."""

    async def take(self, owner: str, per_minute: int) -> Rate:
        """Count a request and return the state. A request over the limit is not counted."""


class WorkerRegistry(Protocol):
    """Live workers, their reports and orders, and the state of the queue.

    Orders are kept while their worker is registered. Methods raise WorkerNotFound for an unknown
    worker.
    """

    async def report(self, report: WorkerReport) -> WorkerOrders:
        """Record a worker's report and return its orders. Workers call it about once a second."""

    async def leave(self, worker: str) -> None:
        """Remove a worker that shuts down. A lost worker is removed after a time."""

    async def roll(self) -> WorkerSnapshot:
        """Return the workers by node and engine, without those silent for more than a minute."""

    async def drain(self, worker: str, *, drained: bool) -> WorkerState:
        """Drain or undrain a worker. A drained one finishes its jobs and claims no more."""

    async def restart_engine(self, worker: str) -> WorkerState:
        """Order a restart of the worker's engine, which happens when no job is in it."""

    async def queue(self) -> QueueState:
        """Return the numbers of waiting and running jobs of each class."""
