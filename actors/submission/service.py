"""Submits jobs, for the HTTP API and for batch scripts.

The steps of `Submission.submit` are fixed: check the request, look for the job that an equal one
made, examine and store the photo, make the job, record it. So a returned job is durable, and a
failure leaves at most an orphaned object, never a row without its input.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import structlog

from actors.images.process_pool import Examiner
from actors.images.reader import ImageInfo
from actors.observability.tracing import current_traceparent, tracer
from actors.submission.requests import CheckedRequest, RequestChecker, SubmissionRequest
from persistence.objects.keys import copy_key, input_key, upload_key
from restoration.errors import (
    ArtifactCorrupt,
    DependencyUnavailable,
    IdempotencyConflict,
    IllegalTransition,
    JobNotFound,
    RestorationError,
    UploadNotFound,
    UploadUsed,
)
from restoration.images import UploadLimits
from restoration.jobs import Artifact, Job, JobStatus, NewJob, Reused
from restoration.limits.fair_places import FairPlaces
from restoration.limits.quotas import Quotas
from restoration.ports.jobs import JobSubmissions
from restoration.ports.objects import BlobStore
from restoration.reuse import Reuse
from restoration.tasks import stop
from restoration.webhooks.urls import WebhookRules
from workflows.catalog import Catalog

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
        jobs: JobSubmissions,
        blobs: BlobStore,
        examiner: Examiner,
        limits: UploadLimits,
        webhooks: WebhookRules | None = None,
        allowed_nodes: Collection[str] = (),
    ) -> None:
        """`allowed_nodes` are the node classes that users' own graphs may contain."""
        self._checker = RequestChecker(catalog, limits, webhooks or WebhookRules(), allowed_nodes)
        self._jobs = jobs
        self._blobs = blobs
        self._examiner = examiner
        self._limits = limits
        self._digests = FairPlaces(DIGESTS_AT_ONCE, "digests")

    @property
    def max_image_bytes(self) -> int:
        return self._limits.max_bytes

    async def submit(self, request: SubmissionRequest) -> Submitted:
        """Record a job, which survives the failure of any process once this returns.

        Raises InvalidRequest or a subclass, IdempotencyConflict, UploadNotFound, UploadUsed,
        QueueFull, StorageFull, DependencyUnavailable.
        """
        with tracer.start_as_current_span("submit"):
            checked = self.check(request)
            digest = await self._digest(checked)
            if earlier := await self._find_earlier(request, digest):
                return Submitted(earlier, replayed=True)
            # A job has its upload's id, so that an upload becomes a job only once.
            job_id = request.upload_id or uuid4()
            try:
                photo = await self._receive_photo(checked, job_id)
            except UploadNotFound:
                # A concurrent request may have made a job of the upload after the check above.
                if earlier := await self._find_job_of_upload(request, digest):
                    return Submitted(earlier, replayed=True)
                raise
            new = await self.make_job(checked, job_id, photo)
            new = replace(new, idempotency_key=request.idempotency_key, request_digest=digest)
            return await self._record(request, new)

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
                f"the job is {source.status}; only a failed or cancelled job can be retried",
                status=source.status,
            )
        new = replace(self._checker.again(source), traceparent=current_traceparent())
        job, created = await self._jobs.insert(new, quotas)
        return Submitted(job, replayed=not created)

    # The steps, which a batch takes for each of its photos.

    def check(self, request: SubmissionRequest) -> CheckedRequest:
        """Validate all but the picture. Raises InvalidRequest or a subclass."""
        return self._checker.check(request)

    async def check_room(self, request: SubmissionRequest) -> None:
        """Check the owner's limits before anything is stored. Raises QueueFull, StorageFull."""
        # An upload's bytes are counted since its link was given; `image` is empty then.
        await self._jobs.check_room(request.owner, request.quotas, len(request.image))

    async def store_photo(
        self, image: bytes, job_id: UUID, checked: CheckedRequest | None = None
    ) -> StoredPhoto:
        """Examine and store a photo.

        Without `checked`, call `check_result` once the request is known. Raises InvalidRequest or a
        subclass for an unusable picture, DependencyUnavailable.
        """
        return await self._put(job_id, image, await self._examine(image, checked))

    def check_result(self, checked: CheckedRequest, picture: ImageInfo) -> None:
        """Check the size of the result. Raises ImageTooLarge or GraphRefused if it is too large."""
        self._checker.check_result(checked, picture)

    async def make_job(self, checked: CheckedRequest, job_id: UUID, photo: StoredPhoto) -> NewJob:
        """Return the job to record for a stored photo.

        If the request allows reuse, the job gets a copy of an earlier result of the same work: a
        copy, because the earlier one may be removed at any moment. Raises DependencyUnavailable.
        """
        new = replace(checked.job(job_id, photo.artifact), traceparent=current_traceparent())
        if checked.request.reuse is Reuse.NEVER:
            return new
        with tracer.start_as_current_span("find_result"):
            reusable = await self._jobs.find_result(new)
        if reusable is None:
            return new
        try:
            with tracer.start_as_current_span("copy_result"):
                key = copy_key(new.id, new.output_format)
                output = await self._blobs.copy(reusable.result(), key)
        except (ArtifactCorrupt, DependencyUnavailable) as error:
            # The result was removed, is corrupt, or S3 failed: execute the job instead.
            log.warning("result_not_reused", job_id=str(reusable.id), reason=error.message)
            return new
        return replace(new, reused=Reused(reusable.reused_from or reusable.id, output))

    async def discard(self, *keys: str) -> None:
        """Delete objects that no job needs. A failure is logged."""
        for key in keys:
            try:
                await self._blobs.delete(key)
            except DependencyUnavailable as error:  # must not fail the caller's request
                log.warning("object_orphaned", key=key, reason=error.message)

    # The other steps of `submit`.

    async def _digest(self, checked: CheckedRequest) -> str:
        request = checked.request
        subject = request.image
        if request.upload_id is not None:
            subject = b"upload:" + request.upload_id.bytes
        async with self._digests.turn(request.owner):
            return await asyncio.to_thread(checked.digest, subject)

    async def _find_earlier(self, request: SubmissionRequest, digest: str) -> Job | None:
        """Return the job that an equal request made under this idempotency key or of this upload.

        Raises IdempotencyConflict or UploadUsed if that request was a different one.
        """
        if request.idempotency_key is not None:
            found = await self._jobs.find_by_key(request.owner, request.idempotency_key)
            if found is not None:
                if found.request_digest != digest:
                    raise IdempotencyConflict(
                        "this Idempotency-Key was used for a different request; use a new key",
                        job_id=str(found.id),
                    )
                return found
        return await self._find_job_of_upload(request, digest)

    async def _find_job_of_upload(self, request: SubmissionRequest, digest: str) -> Job | None:
        """Return the job made of the upload, or None. Raises UploadUsed if its request differs."""
        if request.upload_id is None:
            return None
        try:
            found = await self._jobs.get(request.upload_id, request.owner)
        except JobNotFound:
            return None
        if found.request_digest != digest:
            raise UploadUsed(
                "the upload was already used for another job; upload the photo again",
                job_id=str(found.id),
            )
        return found

    async def _receive_photo(self, checked: CheckedRequest, job_id: UUID) -> StoredPhoto:
        """Examine the request's photo, check the owner's limits meanwhile, and store the photo."""
        request = checked.request
        examining = asyncio.create_task(self._fetch_and_examine(checked))
        try:
            await self.check_room(request)
            image, picture = await examining
        finally:
            await stop(examining)  # do not decode for a request that was refused
        # Two concurrent requests for one upload share the job id; each needs its own object.
        return await self._put(uuid4() if request.upload_id else job_id, image, picture)

    async def _fetch_and_examine(self, checked: CheckedRequest) -> tuple[bytes, ImageInfo]:
        request = checked.request
        image: bytes | None = request.image
        if request.upload_id is not None:
            key = upload_key(request.owner, request.upload_id)
            image = await self._blobs.fetch(key, self._limits.max_bytes)
        if image is None:  # or it is another owner's
            raise UploadNotFound("the upload does not exist, or its photo has not been sent yet")
        return image, await self._examine(image, checked)

    async def _examine(self, image: bytes, checked: CheckedRequest | None) -> ImageInfo:
        with tracer.start_as_current_span("examine"):
            picture = await self._examiner.examine(image)
            if checked is not None:
                self.check_result(checked, picture)
            return picture

    async def _put(self, name: UUID, image: bytes, picture: ImageInfo) -> StoredPhoto:
        with tracer.start_as_current_span("store_input"):
            key = input_key(name, picture.type)
            return StoredPhoto(picture, await self._blobs.put(key, image, picture.type.value))

    async def _record(self, request: SubmissionRequest, new: NewJob) -> Submitted:
        """Insert the job, and delete the objects that no job needs then."""
        try:
            with tracer.start_as_current_span("record"):
                job, created = await self._jobs.insert(new, request.quotas)
        except DependencyUnavailable:  # the job may be recorded, so its objects stay
            raise
        except RestorationError:
            await self.discard(*new.object_keys)
            raise
        if not created:  # another request with the same key was recorded first
            await self.discard(*new.object_keys)
        if request.upload_id is not None:
            await self.discard(upload_key(request.owner, request.upload_id))
        return Submitted(job, replayed=not created)
