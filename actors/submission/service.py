"""The one door for a job, over HTTP and from batch scripts alike.

Check everything, then S3, then the row, then the hint: whoever gets a job back may rely on it.
A failure on the way leaves at most an orphaned object, never a row without its input.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import structlog

from actors.images.process_pool import Examiner
from actors.images.reader import ImageInfo
from actors.submission.requests import MAX_NAME_CHARS, Order, Orders, SubmissionRequest
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

__all__ = ["MAX_NAME_CHARS", "Order", "StoredPhoto", "Submission", "SubmissionRequest", "Submitted"]

log = structlog.get_logger(__name__)

# Photos that are hashed at a time: there are few threads for it, and a photo may have 50 MiB.
DIGESTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Submitted:
    """`replayed`: the idempotency key had been used, and this is the job it made."""

    job: Job
    replayed: bool


@dataclass(frozen=True, slots=True)
class StoredPhoto:
    """A photo that was examined and is stored, and that no job names yet."""

    picture: ImageInfo
    artifact: Artifact


class Submission:
    """Checks and records jobs. Holds no state of its own but whose turn it is."""

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
        """Graphs of users' own may have the `allowed_nodes`."""
        self._orders = Orders(catalog, limits, webhooks or WebhookRules(), allowed_nodes)
        self._jobs = jobs
        self._blobs = blobs
        self._examiner = examiner
        self._limits = limits
        self._tracer = tracer or NullTracer()
        self._digests = FairPlaces(DIGESTS_AT_ONCE, "digests")

    @property
    def max_image_bytes(self) -> int:
        return self._limits.max_bytes

    def check(self, request: SubmissionRequest) -> Order:
        """All that can be said without the picture. Raises InvalidRequest and its kin."""
        return self._orders.check(request)

    async def submit(self, request: SubmissionRequest) -> Submitted:
        """Record a job that will end, whatever is killed after this returns.

        Raises InvalidRequest and its kin, IdempotencyConflict, UploadNotFound, UploadUsed,
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
            # removed, if another request made a job of it after this one had looked for that
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
        if not created:  # another request with the same key was quicker
            await self.discard(*new.object_keys)
        if request.upload_id is not None:
            await self.discard(upload_key(request.owner, request.upload_id))
        return Submitted(job, replayed=not created)

    async def _prepare(self, request: SubmissionRequest, order: Order) -> NewJob:
        """As `prepare`; whether there is room is found out while the picture is examined."""
        examining = asyncio.create_task(self._examined(request, order))
        try:
            await self.demand_room(request)
            complete, picture = await examining
        finally:
            await stop(examining)  # no decoder works for a request that was refused
        # so that an upload becomes a job only once
        job_id = request.upload_id or uuid4()
        return await self._stored(complete, order, job_id, picture)

    async def _examined(
        self, request: SubmissionRequest, order: Order
    ) -> tuple[SubmissionRequest, ImageInfo]:
        complete = await self._complete(request)
        return complete, await self._examine(complete, order)

    async def _complete(self, request: SubmissionRequest) -> SubmissionRequest:
        """With the picture, from wherever it is."""
        if request.upload_id is None:
            return request
        upload = (self._blobs, request.owner, request.upload_id, self._limits)
        return replace(request, image=await fetch_upload(*upload))

    async def retry(
        self, job_id: UUID, owner: str | None = None, quotas: Quotas | None = None
    ) -> Submitted:
        """Send a job that failed or was cancelled again, as a new job on the same input.

        The new job asks for the same of the workflow as it is now. A job is sent again once:
        after that `replayed` says that the job is an earlier one. Raises JobNotFound, QueueFull,
        StorageFull, InputExpired, IllegalTransition for a job in another state, as `check` when the
        workflow or the rules have changed, DependencyUnavailable.
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
        """The job that was made of the upload, if it was for the same request."""
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
        """Before anything is stored. Raises QueueFull, StorageFull."""
        await self._jobs.check_room(request.owner, request.quotas, len(request.image))

    async def prepare(self, request: SubmissionRequest, order: Order, job_id: UUID) -> NewJob:
        """Examine the picture and store it; what comes back is ready to be recorded.

        With a stored result for it, if there is one and the request allows that. Raises
        InvalidRequest and its kin for a picture that cannot be used.
        """
        picture = await self._examine(request, order)
        return await self._stored(request, order, job_id, picture)

    async def store(self, image: bytes, job_id: UUID) -> StoredPhoto:
        """Examine the picture and store it, whatever will be asked for.

        Raises InvalidRequest and its kin for a picture that cannot be used.
        """
        with spanning(self._tracer, "examine"):
            picture = await self._examiner.examine(image)
        return StoredPhoto(
            picture, await self._put(input_key(job_id, picture.type), image, picture)
        )

    async def prepare_stored(
        self, photo: StoredPhoto, request: SubmissionRequest, order: Order, job_id: UUID
    ) -> NewJob:
        """As `prepare`, of a photo that `store` returned for the same `job_id`."""
        self._orders.check_result(order, photo.picture)
        return await self._made(request, order, job_id, photo.artifact)

    async def _examine(self, request: SubmissionRequest, order: Order) -> ImageInfo:
        with spanning(self._tracer, "examine"):
            picture = await self._examiner.examine(request.image)
            self._orders.check_result(order, picture)
            return picture

    async def _stored(
        self, request: SubmissionRequest, order: Order, job_id: UUID, picture: ImageInfo
    ) -> NewJob:
        # two requests for one upload are about to make the same job: to each its own object
        key = input_key(uuid4() if request.upload_id else job_id, picture.type)
        stored = await self._put(key, request.image, picture)
        return await self._made(request, order, job_id, stored)

    async def _put(self, key: str, image: bytes, picture: ImageInfo) -> Artifact:
        with spanning(self._tracer, "store_input"):
            return await self._blobs.put(key, image, picture.type.value)

    async def _made(
        self, request: SubmissionRequest, order: Order, job_id: UUID, stored: Artifact
    ) -> NewJob:
        new = replace(order.job(job_id, request.owner, stored), traceparent=_traceparent())
        return await self._answered(new) if request.reuse is Reuse.ALLOW else new

    async def _answered(self, new: NewJob) -> NewJob:
        """With a copy of the result of the same work, or as it was.

        The copy is the new job's own: the earlier one may be removed at any moment.
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
            # removed meanwhile, or worse; the job can still be executed
            log.warning("result_not_reused", job_id=str(earlier.id), reason=error.message)
            return new
        return replace(new, reused=Reused(earlier.reused_from or earlier.id, output))

    async def discard(self, *keys: str) -> None:
        """Remove objects that no job needs."""
        for key in keys:
            try:
                await self._blobs.delete(key)
            except DependencyUnavailable as error:  # no reason to keep the answer from the caller
                log.warning("object_orphaned", key=key, reason=error.message)


def _traceparent() -> str:
    """For the job's row: the request's trace goes on where the job is claimed."""
    return (current() or TraceContext.new()).header


def _subject(request: SubmissionRequest) -> bytes:
    """What tells this request's picture from every other."""
    return request.image if request.upload_id is None else b"upload:" + request.upload_id.bytes
