"""The seams of the system: what the core asks of Postgres, S3 and Redis.

Every implementation raises errors of `restoration.errors` only; a dependency that cannot be
reached is DependencyUnavailable. One contract suite in tests/contracts holds each port's rules.
The seam to ComfyUI is `restoration.engine_port`.
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
    """The truth about jobs. A method changes a job in one transaction, fenced where it takes a ref;
    those that go through many jobs may take several.

    A method that takes an AttemptRef raises LeaseLost when that attempt does not own the job.
    """

    async def insert(self, job: NewJob, quotas: Quotas | None = None) -> tuple[Job, bool]:
        """Record a queued job and notify the dispatcher: (job, True).

        With an idempotency key that its owner has used already: (the earlier job, False), or
        IdempotencyConflict when the request digests differ. A job that was sent again already is
        taken for a used key. Raises QueueFull when too many jobs wait, StorageFull when too much
        would be stored. From then on `quotas`, by default the store's own, say how many of its
        owner's jobs may run at a time: claims pass over the others. A job that is sent again
        without quotas leaves that as it was. A job with a reused result is
        recorded as succeeded, and nobody is notified.
        """

    async def find_by_key(self, owner: str, idempotency_key: str) -> Job | None:
        """The job that the key made, for as long as keys live."""

    async def check_room(
        self, owner: str, quotas: Quotas | None = None, more_bytes: int = 0
    ) -> None:
        """Raises what `insert` would: to ask before an upload of so many bytes is stored."""

    async def get(self, job_id: UUID, owner: str | None = None) -> Job:
        """Raises JobNotFound; with `owner`, somebody else's job does not exist either."""

    async def find_result(self, job: NewJob) -> Job | None:
        """The newest job whose stored result does for `job` as well (`restoration.reuse`)."""

    async def find(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        """Those of the jobs that there are, in any order."""

    async def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        """Those of the jobs that have ended."""

    async def list(
        self,
        owner: str,
        statuses: Sequence[JobStatus] = (),
        cursor: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        """Newest first; no statuses means all. Raises InvalidRequest for a foreign cursor."""

    async def claim(
        self,
        worker: str,
        lease_s: float,
        workflows: Sequence[str],
        affinity: Affinity | None = None,
    ) -> Job | None:
        """Give the best waiting job of these workflows to `worker`; None when none waits.

        A workflow is a name, or `versioned` for one version of it: others' jobs are left alone.

        Interactive before batch; within a class owners take turns, each with its oldest job. With
        `affinity`, the worker's own, the first few of them come in the order that it says.
        """

    async def heartbeat(self, ref: AttemptRef, lease_s: float) -> JobStatus:
        """Extend the lease; RUNNING, or CANCELLING when the worker is to stop."""

    async def succeed(
        self, ref: AttemptRef, output: Artifact, timings_s: Mapping[str, float]
    ) -> Job:
        """Finish the job. Repeating it for the same attempt changes nothing."""

    async def fail(self, ref: AttemptRef, failure: Failure) -> Job:
        """End the job as failed: another attempt would fail the same way."""

    async def release(
        self,
        ref: AttemptRef,
        failure: Failure | None,
        delay_s: float = 0,
        *,
        charged: bool = True,
    ) -> Job:
        """Hand the job back, to be claimed again after `delay_s`, by another worker if possible.

        With a failure the attempt is held against the job, which fails once it has had
        `max_attempts`; not so if it is not `charged`. A job that was being cancelled ends as
        cancelled.
        """

    async def request_cancel(self, job_id: UUID, owner: str | None = None) -> Job:
        """Cancel a waiting job at once, ask the worker of a running one; idempotent."""

    async def reclaim(self, worker: str | None = None) -> Sequence[Job]:
        """Release every job whose lease has lapsed, or all those of a dead `worker`."""

    async def expire(self) -> Sequence[Job]:
        """Fail jobs that did not start by their queue deadline; a bounded number each call."""

    async def promote(self) -> None:
        """Let owners whose batch jobs have waited long take turns with interactive ones.

        To be called about once a second: nothing starves for longer than that and the policy say.
        """

    async def waiting(self, limit: int) -> Sequence[AttemptRef]:
        """Jobs that could be claimed now, each with the attempt it waits for.

        The best is first; after it the order is that of owners, not of turns.
        """

    async def demand(self) -> Demand:
        """Jobs that wait and jobs in hand, of all owners.

        Of an owner whose jobs may not all run at a time, only as many of either class count as
        waiting as could start.
        """

    async def deliveries(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Delivery]:
        """The webhooks of those of the jobs that have ended and asked for one.

        Each was recorded by whatever ended its job, in the same transaction.
        """

    async def ping(self) -> None: ...


class BatchStore(Protocol):
    """The truth about batches; their jobs are in the JobStore. BatchNotFound as JobNotFound."""

    async def insert(
        self, batch: NewBatch, jobs: Sequence[NewJob], quotas: Quotas | None = None
    ) -> tuple[JobBatch, bool]:
        """Record the batch and all its jobs, or nothing: (batch, True). Each job names the batch.

        With an idempotency key that its owner has used already: (the earlier batch, False), or
        IdempotencyConflict when the request digests differ. `quotas` as in `JobStore.insert`.
        """

    async def find_by_key(self, owner: str, idempotency_key: str) -> JobBatch | None: ...

    async def get(self, batch_id: UUID, owner: str | None = None) -> JobBatch: ...

    async def find(self, batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        """Those of the batches that there are, in any order."""

    async def list(self, owner: str, cursor: str | None = None, limit: int = 50) -> BatchPage:
        """Newest first. Raises InvalidRequest for a foreign cursor."""

    async def items(
        self, batch_id: UUID, owner: str | None = None, first: int = 0, limit: int = 1000
    ) -> Sequence[BatchItem]:
        """Up to `limit` photos, by index, from the one at index `first`."""

    async def request_cancel(self, batch_id: UUID, owner: str | None = None) -> JobBatch:
        """`JobStore.request_cancel` for each job of the batch; idempotent."""


@dataclass(frozen=True, slots=True)
class NewUpload:
    """What a client is about to write by itself. `sha256` in lower-case hex, if it is known."""

    content_type: str
    size_bytes: int
    sha256: str | None = None


class UploadStore(Protocol):
    """Direct uploads that no job was made of yet. The JobStore that records a job with an upload's
    id ends it."""

    async def begin(
        self,
        upload_id: UUID,
        owner: str,
        size_bytes: int,
        lifetime_s: float,
        quotas: Quotas | None = None,
    ) -> None:
        """Count so many bytes as stored for `owner` until a job is made of them, or the time is up.

        `quotas` are by default the store's own. Raises QueueFull if no job could be made of them
        now, StorageFull if too much would be stored, or announced.
        """

    async def size_of(self, upload_id: UUID, owner: str) -> int | None:
        """The bytes that were announced; None for none of the owner's uploads."""


@dataclass(frozen=True, slots=True)
class UploadLink:
    """Where to PUT an upload, with exactly these headers, until then."""

    url: str
    headers: Mapping[str, str]
    expires_at: datetime


class BlobStore(Protocol):
    """Bytes by key. What `put` returned is what `get` must deliver, to the bit."""

    async def put(self, key: str, data: bytes, content_type: str) -> Artifact: ...

    async def get(self, artifact: Artifact) -> bytes:
        """Raises ArtifactCorrupt when size or sha256 differ, or the object is gone."""

    async def read(self, artifact: Artifact, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, which are within the artifact's.

        Raises ArtifactCorrupt when the size differs or the object is gone; that the bytes are
        those that were put shows in the sha256 of all of them.
        """

    async def copy(self, artifact: Artifact, key: str) -> Artifact:
        """The same bytes once more, as `put` would have stored them. Raises as `get`."""

    async def delete(self, key: str) -> None:
        """Deleting what is not there is no error."""

    async def delete_many(self, keys: Sequence[str]) -> None:
        """As `delete`, for any number of keys."""

    def list(self, prefix: str, older_than: datetime) -> AsyncIterator[Sequence[str]]:
        """The keys that begin with `prefix` and were last written before then, in pages."""

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        """A URL that delivers the object without a token until `lifetime_s` has passed."""

    async def upload_link(self, key: str, upload: NewUpload, lifetime_s: int) -> UploadLink:
        """Lets whoever has it write that object, and no other."""

    async def fetch(self, key: str, max_bytes: int) -> bytes | None:
        """Bytes that nobody has vouched for: at most one more than `max_bytes`, None for none."""

    async def ping(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StampedEvent:
    """An event with its place in the job's stream; ids compare in order of publication.

    `row`, if whoever ended the job left it there: the job as that was committed.
    """

    id: str
    event: JobEvent
    row: Job | None = None


class StatusBoard(Protocol):
    """Live progress, best effort: losing all of it loses progress bars and no job."""

    async def publish(self, events: Sequence[tuple[UUID, JobEvent]]) -> None: ...

    async def conclude(self, job: Job) -> None:
        """Publish the end of `job`, whose row is given as it was committed: followers get it
        with the event, unless it is large."""

    async def latest(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[JobEvent]]:
        """The newest event of each type for each of the jobs that has any."""

    def follow(self, job_id: UUID, after_id: str | None = None) -> AsyncIterator[StampedEvent]:
        """Events after `after_id` (None: those kept, from the first), then new ones for ever."""

    async def ping(self) -> None: ...


class RateLimiter(Protocol):
    """Requests of an owner, counted over all replicas; losing the counts loses nothing else."""

    async def take(self, owner: str, per_minute: int) -> Rate:
        """Count a request; one above the limit is counted as none, and not `allowed`."""


class WorkerRegistry(Protocol):
    """Which workers there are, what they do, and what they have been told; and what waits.

    Orders are kept for as long as their worker is there. An unknown worker is WorkerNotFound.
    """

    async def report(self, report: WorkerReport) -> WorkerOrders:
        """Called by each worker about once a second."""

    async def leave(self, worker: str) -> None:
        """Called by a worker that stops in good order; one that is lost is forgotten in time."""

    async def roll(self) -> WorkerSnapshot:
        """By node and engine. One that has been silent for more than a minute is not there."""

    async def drain(self, worker: str, *, drained: bool) -> WorkerState:
        """It finishes what it has in hand, and claims no more until it is undrained."""

    async def restart_engine(self, worker: str) -> WorkerState:
        """Its engine is started anew, when no job is in it."""

    async def queue(self) -> QueueState:
        """How many wait and run, of each class."""
