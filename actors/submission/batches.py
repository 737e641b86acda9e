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
from restoration.ports import BatchStore

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
class Draft:
    """A batch that is assembled photo by photo.

    The job ids increase with the index, because jobs of one transaction have the same age and then
    run in the order of their ids.
    """

    owner: str
    id: UUID = field(default_factory=uuid4)
    names: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    stored: dict[int, StoredPhoto] = field(default_factory=dict)
    jobs: list[NewJob] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    begun_at: datetime = field(default_factory=utc_now)
    _job_ids: list[UUID] = field(
        default_factory=lambda: sorted(uuid4() for _ in range(MAX_BATCH_ITEMS))
    )

    @property
    def object_keys(self) -> set[str]:
        """The keys of all objects stored for the batch."""
        photos = {photo.artifact.key for photo in self.stored.values()}
        return photos.union(*(job.object_keys for job in self.jobs))

    def job_id(self, index: int) -> UUID:
        return self._job_ids[index]

    def add(self, name: str, sha256: str = "") -> tuple[int, UUID]:
        """Add a photo, and return its index and its job's id. Raises BatchTooLarge."""
        index = len(self.names)
        if index == MAX_BATCH_ITEMS:
            raise BatchTooLarge(
                f"a batch holds at most {MAX_BATCH_ITEMS} photos; send the others as another",
                max_items=MAX_BATCH_ITEMS,
            )
        self.names.append(item_name(name))
        self.digests.append(sha256)
        return index, self._job_ids[index]

    def accept(self, index: int, job: NewJob) -> None:
        self.jobs.append(replace(job, batch_id=self.id, batch_index=index))

    def refuse(self, index: int, error: InvalidRequest) -> None:
        self.refusals.append(Refusal(index, Failure.of(error)))

    def digest(self, checked: CheckedRequest) -> str:
        """Return the digest of the whole batch; see `CheckedRequest.digest`."""
        lines = map(" ".join, zip(self.digests, self.names, strict=True))
        return checked.digest("\n".join(lines).encode())

    def finish(self, idempotency_key: str | None = None, digest: str | None = None) -> NewBatch:
        """Return the batch to record. Raises InvalidRequest for a batch without a photo."""
        if not self.names:
            raise InvalidRequest("the batch is empty; send at least one photo")
        self.jobs.sort(key=lambda job: job.id)
        refusals = tuple(sorted(self.refusals, key=lambda refusal: refusal.index))
        names = tuple(self.names)
        return NewBatch(
            self.id, self.owner, names, refusals, idempotency_key, digest, self.begun_at
        )


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
            new = draft.finish(key, draft.digest(checked))
        except BaseException:  # includes the cancellation when the client disconnects
            await self._discard(draft.object_keys)
            raise
        try:
            return await self.record(new, draft.jobs, request.quotas)
        except DependencyUnavailable:  # the batch may be recorded, so its objects stay
            raise
        except RestorationError:
            await self._discard(draft.object_keys)
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
                    f"the batch was not complete within {PUT_TOGETHER_S / 3600:g} hours; nothing of"
                    " it was recorded: submit its photos again, in smaller batches or when there is"
                    " room"
                ) from None
        else:
            batch, created = await self._batches.insert(new, jobs, quotas)
        if batch.id != new.id:  # another request with the same key was recorded first
            await self._discard(key for job in jobs for key in job.object_keys)
        if created:  # the items are known; reading them could fail
            return SubmittedBatch(batch, _items(new, jobs), replayed=False)
        return SubmittedBatch(batch, await self._batches.items(batch.id), replayed=True)

    async def _store_photos(self, photos: AsyncIterator[Photo], draft: Draft) -> None:
        """Examine and store each photo as it arrives.

        The next photo is read while earlier ones are examined and stored. Those are IN_FLIGHT at
        most, and together no larger than one upload may be.
        """
        in_hand = _InHand(IN_FLIGHT, self._submission.max_image_bytes)

        async def store(photo: Photo, index: int, job_id: UUID) -> None:
            try:
                draft.stored[index] = await self._submission.store_photo(photo.data, job_id)
            except InvalidRequest as error:
                draft.refuse(index, error)
            finally:
                await in_hand.give_back(len(photo.data))

        try:
            async with asyncio.TaskGroup() as group:
                async for photo in photos:
                    place = draft.add(photo.name, photo.sha256)
                    await in_hand.take(len(photo.data))
                    group.create_task(store(photo, *place))
                    del photo  # frees its memory before the next one is read
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _make_jobs(self, checked: CheckedRequest, draft: Draft) -> None:
        """Make a job of each stored photo. A photo whose result would be too large is refused."""
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def make(index: int, photo: StoredPhoto) -> None:
            async with slots:
                try:
                    self._submission.check_result(checked, photo.picture)
                except InvalidRequest as error:
                    draft.refuse(index, error)
                    await self._submission.discard(photo.artifact.key)
                else:
                    job_id = draft.job_id(index)
                    draft.accept(index, await self._submission.make_job(checked, job_id, photo))

        try:
            async with asyncio.TaskGroup() as group:
                for index, photo in draft.stored.items():
                    group.create_task(make(index, photo))
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

    async def _discard(self, keys: Iterable[str]) -> None:
        await asyncio.gather(*(self._submission.discard(key) for key in keys))


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
