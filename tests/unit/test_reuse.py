"""Point 4, the rule: which jobs share one result, and its effect on a submission."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from actors.submission.requests import SubmissionRequest
from actors.submission.service import Submission
from persistence.objects.keys import upload_key
from restoration.errors import DependencyUnavailable, IdempotencyConflict
from restoration.images import UploadLimits
from restoration.jobs import Artifact, Job, JobOptions, JobStatus, OutputFormat, Priority
from restoration.reuse import Reuse, work_key
from tests.fakes.images import ImagesHere
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.site import photo
from tests.fakes.stores import MemoryBlobStore
from tests.support.samples import artifact, new_job
from workflows.catalog import load_catalog


@pytest.mark.reuse
@pytest.mark.parametrize(
    "change",
    [
        {"owner": "mallory"},
        {"input": replace(artifact("inputs/1.png"), sha256="1" * 64)},
        {"workflow": "enlarge"},
        {"workflow_version": "2"},
        {"params": {"seed": 2, "strength": 0.5}},
        {"params": {"seed": 1}},
        {"output_format": OutputFormat.WEBP},
        {"options": JobOptions(keep_metadata=True)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_picture_makes_another_work(change: Mapping[str, Any]) -> None:
    """Each of these alone suffices: a seed among the parameters, or the owner."""
    asked = new_job(params={"seed": 1, "strength": 0.5})
    assert work_key(asked) != work_key(replace(asked, **change))


@pytest.mark.reuse
def test_what_changes_nothing_in_the_picture_is_no_part_of_it() -> None:
    """The order of parameters, the job's id, its input's key, priority and limits do not count."""
    asked = new_job(params={"seed": 1, "strength": 0.5})
    alike = new_job(
        params={"strength": 0.5, "seed": 1},
        input=artifact("inputs/2.png"),
        priority=Priority.BATCH,
        max_attempts=1,
        run_limit_s=9,
        webhook_url="https://example.com/",
        idempotency_key="k",
        request_digest="d",
    )
    assert work_key(asked) == work_key(alike)


class Door:
    """A submission, and a worker that restores every photo to `result`."""

    def __init__(self) -> None:
        self.jobs, self.blobs, limits = MemoryJobStore(), MemoryBlobStore(), UploadLimits()
        self._submission = Submission(
            load_catalog(), self.jobs, self.blobs, ImagesHere(limits), limits
        )

    async def submit(self, reuse: Reuse = Reuse.ALLOW, **changes: Any) -> Job:
        request = SubmissionRequest("ann", photo(), "restore", {}, reuse=reuse)
        return (await self._submission.submit(replace(request, **changes))).job

    async def finish(self, result: bytes = b"restored", **changes: Any) -> Job:
        await self.submit(Reuse.NEVER, **changes)
        job = await self.jobs.claim("w", 60, ["restore"])
        assert job is not None
        output = await self.blobs.put(f"outputs/{job.id}/1.png", result, "image/png")
        return await self.jobs.succeed(job.ref, output, {})


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.mark.reuse
async def test_the_same_job_is_answered_from_the_stored_result(door: Door) -> None:
    """The answer comes at once, without an attempt, with a copy: the earlier result may go."""
    earlier = await door.finish()
    job = await door.submit()
    assert (job.status, job.attempt, job.attempts) == (JobStatus.SUCCEEDED, 0, ())
    assert (job.reused_from, job.started_at) == (earlier.id, None)
    await door.blobs.delete(earlier.result().key)
    assert await door.blobs.get(job.result()) == b"restored"
    assert await door.jobs.claim("w", 60, ["restore"]) is None


@pytest.mark.reuse
async def test_a_copy_does_as_well_and_names_whose_it_is(door: Door) -> None:
    """A result outlives the job that made it; the executed job stays known."""
    first = await door.finish()
    await door.submit()
    await door.blobs.delete(first.result().key)
    del door.jobs.rows[first.id], door.jobs.work_keys[first.id]
    assert (await door.submit()).reused_from == first.id


@pytest.mark.reuse
async def test_nobody_gets_it_who_did_not_ask(door: Door) -> None:
    """Without a request for reuse a job is executed."""
    await door.finish()
    assert (await door.submit(Reuse.NEVER)).status is JobStatus.QUEUED
    request = SubmissionRequest("ann", photo(), "restore", {})
    assert request.reuse is Reuse.NEVER


@pytest.mark.reuse
async def test_what_has_not_succeeded_answers_nobody(door: Door) -> None:
    """Equal jobs that wait, run or were cancelled have no result: then both are executed."""
    first = await door.submit()
    second = await door.submit()
    assert [first.status, second.status] == [JobStatus.QUEUED] * 2
    await door.jobs.request_cancel(first.id)
    running = await door.jobs.claim("w", 60, ["restore"])
    assert running is not None
    assert (await door.submit()).status is JobStatus.QUEUED


@pytest.mark.reuse
@pytest.mark.parametrize("what", ["gone", "overwritten"])
async def test_a_result_that_is_not_what_it_was_is_not_passed_on(door: Door, what: str) -> None:
    """The job is executed instead, and the attempt to copy leaves no object."""
    output = (await door.finish()).result()
    if what == "gone":
        await door.blobs.delete(output.key)
    else:
        await door.blobs.put(output.key, b"replaced", "image/png")
    job = await door.submit()
    assert (job.status, job.output) == (JobStatus.QUEUED, None)
    assert not [key for key in door.blobs.objects if str(job.id) in key and "outputs" in key]


@pytest.mark.reuse
async def test_a_store_that_cannot_copy_costs_gpu_time_only(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of an optimisation must not refuse a job."""

    async def copy(*_: object) -> Artifact:
        raise DependencyUnavailable("S3: NotImplemented")

    await door.finish()
    monkeypatch.setattr(door.blobs, "copy", copy)
    assert (await door.submit()).status is JobStatus.QUEUED


@pytest.mark.reuse
async def test_a_copy_for_a_job_that_was_not_recorded_is_removed(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that lost to another with its key leaves no object behind."""
    await door.finish()
    before = set(door.blobs.objects)

    async def insert(*_: object) -> tuple[Job, bool]:
        raise IdempotencyConflict("another was quicker")

    monkeypatch.setattr(door.jobs, "insert", insert)
    with pytest.raises(IdempotencyConflict):
        await door.submit()
    assert set(door.blobs.objects) == before


@pytest.mark.reuse
async def test_a_direct_upload_may_be_answered_too(door: Door) -> None:
    """Its job keeps the upload's id, and the copy is named after it, so no sweeper removes it."""
    await door.finish()
    upload_id = uuid4()
    await door.blobs.put(upload_key("ann", upload_id), photo(), "image/png")
    job = await door.submit(image=b"", upload_id=upload_id)
    assert (job.id, job.status) == (upload_id, JobStatus.SUCCEEDED)
    assert job.result().key.startswith(f"outputs/{upload_id}/")


@pytest.mark.reuse
async def test_a_key_means_the_same_request_with_and_without_reuse(door: Door) -> None:
    """Both ask for the same picture, so a retry may differ in this option."""
    first = await door.submit(Reuse.NEVER, idempotency_key="k")
    assert (await door.submit(Reuse.ALLOW, idempotency_key="k")).id == first.id
