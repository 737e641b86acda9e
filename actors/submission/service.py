"""Submits jobs, for the HTTP API and for batch scripts.

The order is fixed: validate, write to S3, write the row, send the hint. So a returned job is
durable, and a failure leaves at most an orphaned object, never a row without its input.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import structlog

from actors.images.process_pool import Examiner
from actors.images.reader import ImageInfo
from actors.submission.requests import (
    MAX_NAME_CHARS,
    CheckedRequest,
    RequestChecker,
    SubmissionRequest,
)
from actors.submission.uploads import fetch_upload
from persistence.objects.keys import copy_key, input_key, upload_key
from restoration.errors import (
    ArtifactCorrupt,
    DependencyUnavailable,
    IdempotencyConflict,
    IllegalTransition,
    JobNotFound,
    QueueFull,
    StorageFull,
    UploadNotFound,
    UploadUsed,
)
from restoration.images import UploadLimits
from restoration.jobs import (
    Artifact,
    Job,
    JobStatus,
    NewJob,
    Reused,
)
from restoration.limits.fair_places import FairPlaces
from restoration.limits.quotas import Quotas
from restoration.observability.tracing import NullTracer, TraceContext, Tracer, current, spanning
from restoration.ports import BlobStore, JobStore
from restoration.reuse import Reuse
from restoration.tasks import stop
from restoration.webhooks.urls import WebhookRules
from workflows.catalog import Catalog

__all__ = [
    "MAX_NAME_CHARS",
    "CheckedRequest",
    "StoredPhoto",
    "Submission",
    "SubmissionRequest",
    "Submitted",
]

log = structlog.get_logger(__name__)

# Photos hashed at a time: the threads are few, and a photo may have 50 MiB.
DIGESTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Submitted:
    """A recorded job. `replayed`: an earlier request made it, and this one matched it."""

    job: Job
    replayed: bool


@dataclass(frozen=True, slots=True)
class StoredPhoto:
    """An examined and stored photo that no job refers to yet."""

    picture: ImageInfo
    artifact: Artifact


class Submission:
    """Validates and records jobs. Its only state is the owners' queue for hashing."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: JobStore,
        blobs: BlobStore,
        examiner: Examiner,
        limits: UploadLimits,
        webhooks: WebhookRules | None = None,
        allowed_nodes: Collection[str] = (),
        tracer: Tracer | None = None,
    ) -> None:
        """`allowed_nodes` are the node classes that users' own graphs may contain."""
        self._orders = RequestChecker(catalog, limits, webhooks or WebhookRules(), allowed_nodes)
        self._jobs = jobs
        self._blobs = blobs
        self._examiner = examiner
        self._limits = limits
        self._tracer = tracer or NullTracer()
        self._digests = FairPlaces(DIGESTS_AT_ONCE, "digests")

    @property
    def max_image_bytes(self) -> int:
        return self._limits.max_bytes

    def check(self, request: SubmissionRequest) -> CheckedRequest:
        """Validate all but the picture. Raises InvalidRequest or a subclass."""
        return self._orders.check(request)

    async def submit(self, request: SubmissionRequest) -> Submitted:
        """Record a job, which survives the failure of any process once this returns.

        Raises InvalidRequest or a subclass, IdempotencyConflict, UploadNotFound, UploadUsed,
        QueueFull, StorageFull, DependencyUnavailable.
        """
        with spanning(self._tracer, "submit"):
            return await self._submit(request)

    async def _submit(self, request: SubmissionRequest) -> Submitted:
        order = self.check(request)
        async with self._digests.turn(request.owner):
            digest = await asyncio.to_thread(order.digest, _subject(request))
        if earlier := await self._earlier(request, digest):
            return Submitted(earlier, replayed=True)
        try:
            prepared = await self._prepare(request, order)
        except UploadNotFound:
            # A concurrent request may have made a job of the upload after the check above.
            if earlier := await self._made_of(request, digest):
                return Submitted(earlier, replayed=True)
            raise
        new = replace(
            prepared,
            idempotency_key=request.idempotency_key,
            request_digest=digest,
        )
        try:
            with spanning(self._tracer, "record"):
                job, created = await self._jobs.insert(new, request.quotas)
        except (IdempotencyConflict, QueueFull, StorageFull):
            await self.discard(*new.object_keys)
            raise
        if not created:  # another request with the same key was recorded first
            await self.discard(*new.object_keys)
        if request.upload_id is not None:
            await self.discard(upload_key(request.owner, request.upload_id))
        return Submitted(job, replayed=not created)

    async def _prepare(self, request: SubmissionRequest, order: CheckedRequest) -> NewJob:
        """As `prepare`, but check for room while the picture is examined."""
        examining = asyncio.create_task(self._examined(request, order))
        try:
            await self.demand_room(request)
            complete, picture = await examining
        finally:
            await stop(examining)  # do not decode for a request that was refused
        # A job has its upload's id, so that an upload becomes a job only once.
        job_id = request.upload_id or uuid4()
        return await self._stored(complete, order, job_id, picture)

    async def _examined(
        self, request: SubmissionRequest, order: CheckedRequest
    ) -> tuple[SubmissionRequest, ImageInfo]:
        complete = await self._complete(request)
        return complete, await self._examine(complete, order)

    async def _complete(self, request: SubmissionRequest) -> SubmissionRequest:
        """Return the request with its picture, fetched from S3 if it is a direct upload."""
        if request.upload_id is None:
            return request
        upload = (self._blobs, request.owner, request.upload_id, self._limits)
        return replace(request, image=await fetch_upload(*upload))

    async def retry(
        self, job_id: UUID, owner: str | None = None, quotas: Quotas | None = None
    ) -> Submitted:
        """Submit a failed or cancelled job again, as a new job on the same input.

        The new job runs the current version of the workflow. A job is retried only once: further
        calls return the same new job with `replayed` set. Raises JobNotFound, IllegalTransition for
        a job in another state, InputExpired, QueueFull, StorageFull, DependencyUnavailable, and as
        `check` if the workflow or the rules have changed.
        """
        source = await self._jobs.get(job_id, owner)
        if source.status not in {JobStatus.FAILED, JobStatus.CANCELLED}:
            raise IllegalTransition(
                f"the job is {source.status}; only one that failed or was cancelled is sent again",
                status=source.status,
            )
        new = replace(self._orders.again(source), traceparent=_traceparent())
        job, created = await self._jobs.insert(new, quotas)
        return Submitted(job, replayed=not created)

    async def _earlier(self, request: SubmissionRequest, digest: str) -> Job | None:
        if request.idempotency_key is None:
            return await self._made_of(request, digest)
        found = await self._jobs.find_by_key(request.owner, request.idempotency_key)
        if found is not None and found.request_digest != digest:
            raise IdempotencyConflict(
                "this Idempotency-Key was used for a different request; use a new key",
                job_id=str(found.id),
            )
        return found or await self._made_of(request, digest)

    async def _made_of(self, request: SubmissionRequest, digest: str) -> Job | None:
        """Return the job made of the upload, or None. Raises UploadUsed if its request differs."""
        if request.upload_id is None:
            return None
        try:
            found = await self._jobs.get(request.upload_id, request.owner)
        except JobNotFound:
            return None
        if found.request_digest != digest:
            raise UploadUsed(
                "the upload became another job; upload the photo again", job_id=str(found.id)
            )
        return found

    async def demand_room(self, request: SubmissionRequest) -> None:
        """Check the owner's limits before anything is stored. Raises QueueFull, StorageFull."""
        await self._jobs.check_room(request.owner, request.quotas, len(request.image))

    async def prepare(
        self, request: SubmissionRequest, order: CheckedRequest, job_id: UUID
    ) -> NewJob:
        """Examine and store the picture, and return the job to record.

        If the request allows reuse, the job gets a copy of an earlier result of the same work.
        Raises InvalidRequest or a subclass for an unusable picture, DependencyUnavailable.
        """
        picture = await self._examine(request, order)
        return await self._stored(request, order, job_id, picture)

    async def store(self, image: bytes, job_id: UUID) -> StoredPhoto:
        """Examine and store the picture of a request that is not known yet.

        Raises InvalidRequest or a subclass for an unusable picture, DependencyUnavailable.
        """
        with spanning(self._tracer, "examine"):
            picture = await self._examiner.examine(image)
        return StoredPhoto(
            picture, await self._put(input_key(job_id, picture.type), image, picture)
        )

    async def prepare_stored(
        self, photo: StoredPhoto, request: SubmissionRequest, order: CheckedRequest, job_id: UUID
    ) -> NewJob:
        """As `prepare`, for a photo that `store` returned for the same `job_id`."""
        self._orders.check_result(order, photo.picture)
        return await self._made(request, order, job_id, photo.artifact)

    async def _examine(self, request: SubmissionRequest, order: CheckedRequest) -> ImageInfo:
        with spanning(self._tracer, "examine"):
            picture = await self._examiner.examine(request.image)
            self._orders.check_result(order, picture)
            return picture

    async def _stored(
        self, request: SubmissionRequest, order: CheckedRequest, job_id: UUID, picture: ImageInfo
    ) -> NewJob:
        # Two concurrent requests for one upload share the job id; each needs its own object.
        key = input_key(uuid4() if request.upload_id else job_id, picture.type)
        stored = await self._put(key, request.image, picture)
        return await self._made(request, order, job_id, stored)

    async def _put(self, key: str, image: bytes, picture: ImageInfo) -> Artifact:
        with spanning(self._tracer, "store_input"):
            return await self._blobs.put(key, image, picture.type.value)

    async def _made(
        self, request: SubmissionRequest, order: CheckedRequest, job_id: UUID, stored: Artifact
    ) -> NewJob:
        new = replace(order.job(job_id, request.owner, stored), traceparent=_traceparent())
        return await self._answered(new) if request.reuse is Reuse.ALLOW else new

    async def _answered(self, new: NewJob) -> NewJob:
        """Return the job with a copy of an earlier result of the same work, if there is one.

        The result is copied because the earlier one may be removed at any moment.
        """
        with spanning(self._tracer, "find_result"):
            earlier = await self._jobs.find_result(new)
        if earlier is None:
            return new
        key = copy_key(new.id, new.output_format)
        try:
            with spanning(self._tracer, "copy_result"):
                output = await self._blobs.copy(earlier.result(), key)
        except (ArtifactCorrupt, DependencyUnavailable) as error:
            # The result was removed, is corrupt, or S3 failed: execute the job instead.
            log.warning("result_not_reused", job_id=str(earlier.id), reason=error.message)
            return new
        return replace(new, reused=Reused(earlier.reused_from or earlier.id, output))

    async def discard(self, *keys: str) -> None:
        """Delete objects that no job needs. A failure is logged."""
        for key in keys:
            try:
                await self._blobs.delete(key)
            except DependencyUnavailable as error:  # must not fail the caller's request
                log.warning("object_orphaned", key=key, reason=error.message)


def _traceparent() -> str:
    """Return the request's trace context for the job's row, so that its attempts join the trace."""
    return (current() or TraceContext.new()).header


def _subject(request: SubmissionRequest) -> bytes:
    """Return bytes that identify the request's picture."""
    return request.image if request.upload_id is None else b"upload:" + request.upload_id.bytes
