"""Submits batches: each photo is examined and stored as it arrives, then all jobs are recorded in
one transaction.

An unusable photo is refused without affecting the others. A failure leaves at most orphaned
objects: a batch is recorded with all its jobs, or not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID, uuid4

from actors.submission.requests import CheckedRequest, SubmissionRequest
from actors.submission.service import StoredPhoto, Submission
from restoration.batches import (
    MAX_BATCH_ITEMS,
    PUT_TOGETHER_S,
    BatchItem,
    JobBatch,
    NewBatch,
    Refusal,
    item_name,
    utc_now,
)
from restoration.errors import (
    BatchExpired,
    BatchNotFound,
    BatchTooLarge,
    DependencyUnavailable,
    IdempotencyConflict,
    InvalidRequest,
    RestorationError,
)
from restoration.jobs import Failure, JobStatus, NewJob
from restoration.limits.quotas import Quotas
from restoration.ports.batches import BatchStore

# Photos of one batch in memory at a time; each may be as large as an upload.
IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class Photo:
    """A received file. `data` may end one byte above the limit; `sha256` is of the whole file."""

    name: str
    data: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class SubmittedBatch:
    """A recorded batch. `replayed`: an earlier request with the same idempotency key made it."""

    batch: JobBatch
    items: Sequence[BatchItem]
    replayed: bool


@dataclass(slots=True)
class DraftPhoto:
    """A photo of a draft. In the end it has either a job or the reason of its refusal."""

    index: int
    job_id: UUID
    name: str
    sha256: str
    stored: StoredPhoto | None = None
    job: NewJob | None = None
    refusal: Failure | None = None

    def refuse(self, error: InvalidRequest) -> None:
        self.refusal = Failure.of(error)


@dataclass(slots=True)
class Draft:
    """A batch that is assembled photo by photo.

    The job ids increase with the index, because jobs of one transaction have the same age and then
    run in the order of their ids.
    """

    owner: str
    id: UUID = field(default_factory=uuid4)
    photos: list[DraftPhoto] = field(default_factory=list)
    begun_at: datetime = field(default_factory=utc_now)
    _job_ids: list[UUID] = field(
        default_factory=lambda: sorted(uuid4() for _ in range(MAX_BATCH_ITEMS))
    )

    def add(self, name: str, sha256: str = "") -> DraftPhoto:
        """Add a photo. Raises BatchTooLarge."""
        index = len(self.photos)
        if index == MAX_BATCH_ITEMS:
            raise BatchTooLarge(
                f"a batch has at most {MAX_BATCH_ITEMS} photos; send the others in another batch",
                max_items=MAX_BATCH_ITEMS,
            )
        photo = DraftPhoto(index, self._job_ids[index], item_name(name), sha256)
        self.photos.append(photo)
        return photo

    def digest(self, checked: CheckedRequest) -> str:
        """Return the digest of the whole batch; see `CheckedRequest.digest`."""
        lines = (f"{photo.sha256} {photo.name}" for photo in self.photos)
        return checked.digest("\n".join(lines).encode())

    def finish(
        self, idempotency_key: str | None = None, digest: str | None = None
    ) -> tuple[NewBatch, list[NewJob]]:
        """Return the batch to record and its jobs. Raises InvalidRequest for an empty batch."""
        if not self.photos:
            raise InvalidRequest("the batch is empty; send at least one photo")
        new = NewBatch(
            id=self.id,
            owner=self.owner,
            names=tuple(photo.name for photo in self.photos),
            refusals=tuple(Refusal(p.index, p.refusal) for p in self.photos if p.refusal),
            idempotency_key=idempotency_key,
            request_digest=digest,
            begun_at=self.begun_at,
        )
        jobs = [
            replace(photo.job, batch_id=self.id, batch_index=photo.index)
            for photo in self.photos
            if photo.job
        ]
        return new, jobs


class BatchSubmission:
    """Checks and records batches. Holds no state of its own."""

    def __init__(self, submission: Submission, batches: BatchStore) -> None:
        self._submission = submission
        self._batches = batches

    async def submit(
        self,
        request: SubmissionRequest,
        photos: AsyncIterator[Photo],
        read_rest: Callable[[], SubmissionRequest],
    ) -> SubmittedBatch:
        """Record a batch of `photos`, each with the options of the request.

        Options may arrive after the photos: `read_rest` returns the complete request then. Only the
        owner, the quotas and the idempotency key of `request` are used.

        Raises InvalidRequest or a subclass if the request is wrong for every photo, BatchTooLarge,
        BatchExpired, IdempotencyConflict, QueueFull, StorageFull, DependencyUnavailable, and any
        exception of `photos` and `read_rest`.
        """
        if (key := request.idempotency_key) is not None:
            if earlier := await self._batches.find_by_key(request.owner, key):
                return await self._replay(earlier, photos, read_rest)
        await self._submission.check_room(request)
        draft = Draft(request.owner)
        try:
            await self._store_photos(photos, draft)
            checked = self._submission.check(read_rest())
            await self._make_jobs(checked, draft)
            new, jobs = draft.finish(key, draft.digest(checked))
        except BaseException:  # includes the cancellation when the client disconnects
            await self._discard(draft)
            raise
        try:
            return await self.record(new, jobs, request.quotas)
        except DependencyUnavailable:  # the batch may be recorded, so its objects stay
            raise
        except RestorationError:
            await self._discard(draft)
            raise

    async def record(
        self, new: NewBatch, jobs: Sequence[NewJob], quotas: Quotas | None = None
    ) -> SubmittedBatch:
        """Record a batch of prepared jobs. Idempotent.

        If it is refused its objects stay, because the caller may retry when there is room. Raises
        BatchExpired, IdempotencyConflict, QueueFull, StorageFull, DependencyUnavailable.
        """
        if new.is_stale:
            try:  # an earlier call may have recorded it
                batch, created = await self._batches.get(new.id), False
            except BatchNotFound:
                raise BatchExpired(
                    f"the batch was not complete within {PUT_TOGETHER_S / 3600:g} hours and "
                    "was not recorded; submit its photos again, in smaller batches or when "
                    "the service is less busy"
                ) from None
        else:
            batch, created = await self._batches.insert(new, jobs, quotas)
        if batch.id != new.id:  # another request with the same key was recorded first
            await asyncio.gather(*(self._submission.discard(*job.object_keys) for job in jobs))
        if created:  # the items are known; reading them could fail
            return SubmittedBatch(batch, _items(new, jobs), replayed=False)
        return SubmittedBatch(batch, await self._batches.items(batch.id), replayed=True)

    async def _store_photos(self, photos: AsyncIterator[Photo], draft: Draft) -> None:
        """Examine and store each photo as it arrives.

        The next photo is read while earlier ones are examined and stored. Those are IN_FLIGHT at
        most, and together no larger than one upload may be.
        """
        in_hand = _InHand(IN_FLIGHT, self._submission.max_image_bytes)

        async def store(data: bytes, photo: DraftPhoto) -> None:
            try:
                photo.stored = await self._submission.store_photo(data, photo.job_id)
            except InvalidRequest as error:
                photo.refuse(error)
            finally:
                await in_hand.give_back(len(data))

        try:
            async with asyncio.TaskGroup() as group:
                async for received in photos:
                    photo = draft.add(received.name, received.sha256)
                    await in_hand.take(len(received.data))
                    group.create_task(store(received.data, photo))
                    del received  # frees its memory before the next one is read
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _make_jobs(self, checked: CheckedRequest, draft: Draft) -> None:
        """Make a job of each stored photo. A photo whose result would be too large is refused."""
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def make(photo: DraftPhoto, stored: StoredPhoto) -> None:
            async with slots:
                try:
                    self._submission.check_result(checked, stored.picture)
                except InvalidRequest as error:
                    photo.refuse(error)
                    await self._submission.discard(stored.artifact.key)
                else:
                    photo.job = await self._submission.make_job(checked, photo.job_id, stored)

        try:
            async with asyncio.TaskGroup() as group:
                for photo in draft.photos:
                    if photo.stored is not None:
                        group.create_task(make(photo, photo.stored))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _replay(
        self,
        earlier: JobBatch,
        photos: AsyncIterator[Photo],
        read_rest: Callable[[], SubmissionRequest],
    ) -> SubmittedBatch:
        """Return the earlier batch. Raises IdempotencyConflict if this request differs from it."""
        draft = Draft(earlier.owner)
        async for photo in photos:
            draft.add(photo.name, photo.sha256)
        if draft.digest(self._submission.check(read_rest())) != earlier.request_digest:
            raise IdempotencyConflict(
                "this Idempotency-Key was used for a different batch; use a new key",
                batch_id=str(earlier.id),
            )
        return SubmittedBatch(earlier, await self._batches.items(earlier.id), replayed=True)

    async def _discard(self, draft: Draft) -> None:
        """Delete all objects that were stored for the draft."""
        stored = [photo.stored.artifact.key for photo in draft.photos if photo.stored]
        made = [key for photo in draft.photos if photo.job for key in photo.job.object_keys]
        await asyncio.gather(*(self._submission.discard(key) for key in {*stored, *made}))


class _InHand:
    """Limits the photos of one batch in memory, by number and by bytes."""

    def __init__(self, max_photos: int, max_bytes: int) -> None:
        self._max_photos = max_photos
        self._max_bytes = max_bytes
        self._photos = 0
        self._bytes = 0
        self._changed = asyncio.Condition()

    async def take(self, size_bytes: int) -> None:
        """Wait until there is room for `size_bytes`. A single photo always has room."""

        def has_room() -> bool:
            fits = self._bytes + size_bytes <= self._max_bytes
            return not self._photos or (fits and self._photos < self._max_photos)

        async with self._changed:
            await self._changed.wait_for(has_room)
            self._photos += 1
            self._bytes += size_bytes

    async def give_back(self, size_bytes: int) -> None:
        async with self._changed:
            self._photos -= 1
            self._bytes -= size_bytes
            self._changed.notify_all()


def _items(new: NewBatch, jobs: Iterable[NewJob]) -> Sequence[BatchItem]:
    """Return the items of a batch that was just recorded."""
    accepted = {job.batch_index: job for job in jobs}
    refused = {refusal.index: refusal.reason for refusal in new.refusals}
    return [
        BatchItem(
            index, name, job.id, JobStatus.SUCCEEDED if job.reused else JobStatus.QUEUED, None
        )
        if (job := accepted.get(index)) is not None
        else BatchItem(index, name, None, None, refused[index])
        for index, name in enumerate(new.names)
    ]
