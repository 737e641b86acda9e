"""Submission: its checks, the order in which things become durable, and the use of a key."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest

from actors.images.reader import ImageInfo
from actors.submission.requests import MAX_NAME_CHARS, CheckedRequest, SubmissionRequest
from actors.submission.service import Submission
from persistence.objects.keys import upload_key
from restoration.errors import (
    BrokenImage,
    DependencyUnavailable,
    IdempotencyConflict,
    ImageTooLarge,
    InvalidParameters,
    InvalidRequest,
    QueueFull,
    UnknownWorkflow,
    UnsupportedImage,
    UploadUsed,
)
from restoration.images import UploadLimits
from restoration.jobs import Artifact, Job, JobOptions, JobStatus, NewJob, OutputFormat, Priority
from restoration.limits.quotas import Quotas
from tests.fakes.images import ImagesHere
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.site import photo
from tests.fakes.stores import MemoryBlobStore
from workflows.catalog import Catalog, load_catalog

LIMITS = UploadLimits()
DEADLINE_S = 300
BATCH = JobOptions(priority=Priority.BATCH)


class Door:
    """A submission on stores that record their calls in `calls`, in order."""

    def __init__(self, catalog: Catalog | None = None, limits: UploadLimits = LIMITS) -> None:
        self.calls: list[str] = []
        self.jobs = _Jobs(self.calls)
        self.blobs = _Blobs(self.calls)
        self.examiner = _Examiner(limits)
        self._submission = Submission(
            catalog or load_catalog(), self.jobs, self.blobs, self.examiner, limits
        )

    async def submit(self, **changes: Any) -> Job:
        return (await self._submission.submit(_request(**changes))).job

    async def replays(self, **changes: Any) -> bool:
        return (await self._submission.submit(_request(**changes))).replayed


class _Examiner(ImagesHere):
    """An examiner that counts its pictures. With `busy` they stay, and the first sets it."""

    def __init__(self, limits: UploadLimits) -> None:
        super().__init__(limits)
        self.at_hand = 0
        self.busy: asyncio.Event | None = None

    async def examine(self, data: bytes) -> ImageInfo:
        self.at_hand += 1
        try:
            if self.busy is not None:
                self.busy.set()
                await asyncio.Event().wait()
            return await super().examine(data)
        finally:
            self.at_hand -= 1


class _Jobs(MemoryJobStore):
    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls
        self.racers: asyncio.Barrier | None = None
        self.room_is_told: asyncio.Event | None = None

    async def check_room(
        self, owner: str, quotas: Quotas | None = None, more_bytes: int = 0, more: int = 1
    ) -> None:
        if self.room_is_told is not None:
            await self.room_is_told.wait()
        await super().check_room(owner, quotas, more_bytes, more)

    async def find_by_key(self, owner: str, idempotency_key: str) -> Job | None:
        found = await super().find_by_key(owner, idempotency_key)
        if self.racers is not None:
            await self.racers.wait()
        return found

    async def insert(self, job: NewJob, quotas: Quotas | None = None) -> tuple[Job, bool]:
        self.racers = None
        self._calls.append("insert")
        return await super().insert(job, quotas)


class _Blobs(MemoryBlobStore):
    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls

    async def put(self, key: str, data: bytes, content_type: str) -> Artifact:
        artifact = await super().put(key, data, content_type)
        self._calls.append("put")
        return artifact

    async def delete(self, key: str) -> None:
        self._calls.append("delete")
        await super().delete(key)


def _request(**changes: Any) -> SubmissionRequest:
    return replace(SubmissionRequest("ann", photo(), "restore", {}), **changes)


@pytest.fixture
def door() -> Door:
    return Door()


async def test_the_job_is_what_was_asked_for(door: Door) -> None:
    """The row has everything in the request, with defaults written out."""
    job = await door.submit(
        workflow="enlarge",
        params={"strength": 0.5},
        output_format=OutputFormat.WEBP,
        options=BATCH,
        idempotency_key="k",
    )
    workflow = load_catalog().find("enlarge")
    assert (job.owner, job.status, job.idempotency_key) == ("ann", JobStatus.QUEUED, "k")
    assert (job.workflow, job.workflow_version) == ("enlarge", workflow.version)
    assert job.params == workflow.resolve({"strength": 0.5})
    assert (job.output_format, job.options.priority) == (OutputFormat.WEBP, Priority.BATCH)
    assert job.max_attempts == workflow.manifest.max_attempts


@pytest.mark.parametrize(
    ("format", "suffix", "content_type"),
    [("JPEG", "jpg", "image/jpeg"), ("PNG", "png", "image/png"), ("TIFF", "tif", "image/tiff")],
)
async def test_the_upload_is_kept_as_it_came(
    door: Door, format: str, suffix: str, content_type: str
) -> None:
    """The object is exactly the upload, named after the job, with the type of its content."""
    image = photo(format=format)
    job = await door.submit(image=image)
    sha256 = hashlib.sha256(image).hexdigest()
    assert job.input == Artifact(f"inputs/{job.id}.{suffix}", sha256, len(image), content_type)
    assert door.blobs.objects == {job.input.key: image}


async def test_the_object_comes_before_the_row(door: Door) -> None:
    """A row never lacks its input: it is inserted once the object is stored."""
    await door.submit()
    assert door.calls == ["put", "insert"]


async def test_without_s3_there_is_no_row(door: Door) -> None:
    """When the object cannot be stored, no job is recorded, and the caller may try again."""
    door.blobs.down = True
    with pytest.raises(DependencyUnavailable):
        await door.submit(idempotency_key="k")
    assert not door.jobs.rows
    door.blobs.down = False
    assert not await door.replays(idempotency_key="k")


async def test_without_postgres_nothing_is_promised(door: Door) -> None:
    """When the row cannot be written, the caller gets an error; at most an object is left."""
    door.jobs.down = True
    with pytest.raises(DependencyUnavailable):
        await door.submit()
    assert not door.jobs.rows


async def test_a_job_that_postgres_refuses_leaves_no_object(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def insert(*_args: object) -> tuple[Job, bool]:
        raise InvalidRequest("a value in the request cannot be stored")

    monkeypatch.setattr(door.jobs, "insert", insert)
    with pytest.raises(InvalidRequest):
        await door.submit()
    assert not door.blobs.objects


REFUSED: dict[str, tuple[dict[str, Any], type[InvalidRequest]]] = {
    "no image": ({"image": b""}, InvalidRequest),
    "another type": ({"image": b"GIF89a"}, UnsupportedImage),
    "half an image": ({"image": photo((64, 64))[:-60]}, BrokenImage),
    "too many pixels": ({"image": photo((4_001, 4_000))}, ImageTooLarge),
    "an unknown workflow": ({"workflow": "nope"}, UnknownWorkflow),
    "an unknown parameter": ({"params": {"strenght": 1}}, InvalidParameters),
    "a value out of bounds": ({"params": {"strength": 7}}, InvalidParameters),
    "no owner": ({"owner": ""}, InvalidRequest),
    "an owner too long": ({"owner": "a" * (MAX_NAME_CHARS + 1)}, InvalidRequest),
    "an owner that Postgres cannot hold": ({"owner": "a\0b"}, InvalidRequest),
    "an empty key": ({"idempotency_key": ""}, InvalidRequest),
    "a key too long": ({"idempotency_key": "a" * (MAX_NAME_CHARS + 1)}, InvalidRequest),
    "a key with a line break": ({"idempotency_key": "a\n"}, InvalidRequest),
}


@pytest.mark.parametrize(("changes", "error"), REFUSED.values(), ids=REFUSED)
async def test_what_is_wrong_is_refused_before_anything_is_stored(
    door: Door, changes: dict[str, Any], error: type[InvalidRequest]
) -> None:
    """Each mistake has its own error, and leaves neither an object nor a row."""
    with pytest.raises(InvalidRequest) as refusal:
        await door.submit(**changes)
    assert type(refusal.value) is error
    assert door.calls == []


async def test_a_request_without_room_leaves_no_picture_behind(door: Door) -> None:
    """Requests refused for a full queue must not keep decoders busy."""
    await door.submit()
    door.examiner.busy = door.jobs.room_is_told = asyncio.Event()
    with pytest.raises(QueueFull):
        await door.submit(quotas=Quotas(waiting_jobs=1))
    assert door.examiner.at_hand == 0
    assert len(door.jobs.rows) == len(door.blobs.objects) == 1


async def test_names_may_be_as_long_as_the_limit(door: Door) -> None:
    """Owner and key of exactly the greatest length are accepted."""
    longest = "a" * MAX_NAME_CHARS
    job = await door.submit(owner=longest, idempotency_key=longest)
    assert (job.owner, job.idempotency_key) == (longest, longest)


def _png_only() -> Catalog:
    restore = load_catalog().find("restore")
    output = restore.manifest.output.model_copy(update={"formats": (OutputFormat.PNG,)})
    manifest = restore.manifest.model_copy(update={"output": output})
    return Catalog({"restore": replace(restore, manifest=manifest)})


async def test_a_format_that_the_workflow_does_not_write_is_refused() -> None:
    """The refusal lists the possible formats; without a format the workflow's own is used."""
    door = Door(_png_only())
    with pytest.raises(InvalidRequest, match="choose from png"):
        await door.submit(output_format=OutputFormat.JPEG)
    assert door.calls == []
    assert (await door.submit()).output_format is OutputFormat.PNG


class TestResultSize:
    async def test_it_is_limited(self) -> None:
        """8 x 8 pixels enlarged four times are 1024: a limit of 1024 passes, one fewer refuses."""
        await Door(limits=UploadLimits(max_result_pixels=1024)).submit(params={"scale": 4})
        too_small = Door(limits=UploadLimits(max_result_pixels=1023))
        with pytest.raises(ImageTooLarge, match="smaller scale"):
            await too_small.submit(params={"scale": 4})
        assert too_small.calls == []
        await too_small.submit(params={"scale": 3})

    async def test_it_must_fit_the_format(self, door: Door) -> None:
        """WebP has no room for a side of 16,384 pixels, which PNG has."""
        wide = photo((4_096, 1))
        with pytest.raises(ImageTooLarge, match="webp"):
            await door.submit(image=wide, output_format=OutputFormat.WEBP)
        await door.submit(image=wide, output_format=OutputFormat.PNG)


class TestIdempotency:
    async def test_a_repetition_gets_the_job_it_made(self, door: Door) -> None:
        """The same request under the same key is the same job, and nothing is stored again."""
        job = await door.submit(idempotency_key="k")
        door.calls.clear()
        door.blobs.down = True  # and no request goes to S3 either
        assert await door.replays(idempotency_key="k")
        assert await door.submit(idempotency_key="k") == job
        assert door.calls == []

    async def test_a_key_belongs_to_its_owner(self, door: Door) -> None:
        """Two owners may use the same key, for a job each."""
        await door.submit(idempotency_key="k")
        assert not await door.replays(idempotency_key="k", owner="bob")

    async def test_without_a_key_every_request_is_a_job(self, door: Door) -> None:
        """The same bytes may be submitted twice on purpose."""
        assert (await door.submit()).id != (await door.submit()).id

    @pytest.mark.parametrize(
        "change",
        [
            {"image": photo((9, 9))},
            {"params": {"strength": 0.25}},
            {"output_format": OutputFormat.JPEG},
            {"options": BATCH},
            {"workflow": "enlarge"},
        ],
        ids=lambda change: next(iter(change)),
    )
    async def test_another_request_under_the_key_is_a_conflict(
        self, door: Door, change: dict[str, Any]
    ) -> None:
        """For any difference, the error names the job that the key made; no new one is made."""
        job = await door.submit(idempotency_key="k")
        with pytest.raises(IdempotencyConflict) as conflict:
            await door.submit(idempotency_key="k", **change)
        assert conflict.value.details["job_id"] == str(job.id)
        assert door.calls == ["put", "insert"]

    async def test_defaults_may_be_written_out(self, door: Door) -> None:
        """A request that states a default is the same as one without, as is 1 for 1.0."""
        await door.submit(idempotency_key="k", params={"strength": 1.0})
        workflow = load_catalog().find("restore")
        assert await door.replays(
            idempotency_key="k",
            params={**workflow.resolve({}), "strength": 1},
            output_format=workflow.manifest.output.default_format,
            options=JobOptions(priority=Priority.INTERACTIVE),
        )


class TestRaces:
    """Requests that find their key unused, but then taken when the row is inserted."""

    @pytest.fixture
    def racing(self, door: Door) -> Door:
        """Return a submission for two requests that both look the key up before one inserts."""
        door.jobs.racers = asyncio.Barrier(2)
        return door

    async def test_duplicates_leave_one_job_and_one_object(self, racing: Door) -> None:
        """Both callers get the one job, and the loser's object is deleted."""
        async with asyncio.timeout(DEADLINE_S):
            jobs = await asyncio.gather(*(racing.submit(idempotency_key="k") for _ in range(2)))
        assert jobs[0] == jobs[1]
        assert list(racing.jobs.rows) == [jobs[0].id]
        assert list(racing.blobs.objects) == [jobs[0].input.key]

    async def test_a_conflict_leaves_no_object(self, racing: Door) -> None:
        """The loser's request differs: it gets a conflict, and its object is deleted."""
        async with asyncio.timeout(DEADLINE_S):
            outcomes = await asyncio.gather(
                racing.submit(idempotency_key="k"),
                racing.submit(idempotency_key="k", options=BATCH),
                return_exceptions=True,
            )
        assert {type(outcome) for outcome in outcomes} == {Job, IdempotencyConflict}
        assert len(racing.jobs.rows) == len(racing.blobs.objects) == 1

    async def test_two_requests_for_one_upload_make_one_job(
        self, door: Door, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The loser asked for something else: it gets UploadUsed, and leaves no object."""
        upload_id, both_looked = uuid4(), asyncio.Barrier(2)
        await door.blobs.put(upload_key("ann", upload_id), photo(), "image/png")
        check_room = door.jobs.check_room

        async def wait_for_the_other(*args: Any) -> None:
            await both_looked.wait()
            await check_room(*args)

        monkeypatch.setattr(door.jobs, "check_room", wait_for_the_other)
        async with asyncio.timeout(DEADLINE_S):
            outcomes = await asyncio.gather(
                door.submit(image=b"", upload_id=upload_id),
                door.submit(image=b"", upload_id=upload_id, options=BATCH),
                return_exceptions=True,
            )
        assert {type(outcome) for outcome in outcomes} == {Job, UploadUsed}
        [job] = door.jobs.rows.values()
        assert list(door.blobs.objects) == [job.input.key]

    async def test_an_object_that_stays_behind_spoils_nothing(
        self, racing: Door, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The loser's answer depends only on the job, not on S3."""

        async def delete(_key: str) -> None:
            raise DependencyUnavailable("S3: refused")

        monkeypatch.setattr(racing.blobs, "delete", delete)
        async with asyncio.timeout(DEADLINE_S):
            jobs = await asyncio.gather(*(racing.submit(idempotency_key="k") for _ in range(2)))
        assert jobs[0] == jobs[1]


class TestDigest:
    REQUEST = SubmissionRequest("ann", b"", options=BATCH)
    CHECKED = CheckedRequest(
        REQUEST, load_catalog().find("restore"), {"a": 1, "b": 2}, OutputFormat.PNG
    )

    def test_it_is_the_same_for_the_same(self) -> None:
        """The order of parameters does not matter."""
        again = replace(self.CHECKED, params={"b": 2, "a": 1})
        assert again.digest(b"x") == self.CHECKED.digest(b"x")

    def test_it_leaves_out_options_with_their_default(self) -> None:
        """A release with one more option gives a request the same digest as the one before it."""

        @dataclass(frozen=True, slots=True, kw_only=True)
        class LaterOptions(JobOptions):
            one_more: bool = False

        later = LaterOptions(priority=Priority.BATCH)
        checked = replace(self.CHECKED, request=replace(self.REQUEST, options=later))
        assert checked.digest(b"x") == self.CHECKED.digest(b"x")
        asked = replace(self.REQUEST, options=replace(later, one_more=True))
        assert replace(checked, request=asked).digest(b"x") != self.CHECKED.digest(b"x")

    def test_it_differs_by_each_part(self) -> None:
        """All of these requests and pictures have different fingerprints."""
        options = [
            replace(BATCH, priority=Priority.INTERACTIVE),
            replace(BATCH, run_limit_s=9),
            replace(BATCH, webhook_url="https://example.com/"),
            replace(BATCH, keep_metadata=True),
        ]
        requests = [
            self.CHECKED,
            replace(self.CHECKED, workflow=load_catalog().find("enlarge")),
            replace(self.CHECKED, params={"a": 1, "b": 3}),
            replace(self.CHECKED, params={"a": 1}),
            replace(self.CHECKED, output_format=OutputFormat.JPEG),
            replace(self.CHECKED, request=replace(self.REQUEST, queue_limit_s=9)),
            *(replace(self.CHECKED, request=replace(self.REQUEST, options=o)) for o in options),
        ]
        digests = {each.digest(image) for each in requests for image in (b"x", b"y", b"")}
        assert len(digests) == 3 * len(requests)
