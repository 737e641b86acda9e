"""The effect of an attempt's end on its job: charged, not charged, or past its time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from actors.dispatcher import Dispatch
from actors.execution.attempt import Execution, Lease
from actors.execution.engine_schedule import EngineOccupancy, EngineSchedule
from actors.execution.outcomes import RetryPolicy
from actors.execution.pipeline import TicketOutcome
from persistence.postgres.leadership import Leadership
from restoration.errors import (
    EngineCrashed,
    EngineError,
    EngineFailed,
    EngineOutOfMemory,
    EngineRejected,
    EngineUnavailable,
)
from restoration.jobs import MAX_MESSAGE_CHARS, AttemptOutcome, AttemptRef, Failure, Job, JobStatus
from tests.fakes.engine import MemoryEngine
from tests.fakes.images import ImagesHere
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.site import photo
from tests.fakes.stores import MemoryBlobStore
from tests.support.samples import new_job
from workflows.catalog import load_catalog


async def _attempt(error: EngineError | None, **changes: object) -> tuple[Job, MemoryJobStore]:
    """Return a job whose attempt ended in `error`."""
    jobs, blobs = MemoryJobStore(), MemoryBlobStore()
    engine = MemoryEngine(photo(), error=error)
    if error is None:  # never ends
        engine.go_on.clear()
    stored = await blobs.put("inputs/1.png", photo(), "image/png")
    catalog = load_catalog()
    params = catalog.find("restore").resolve({})
    await jobs.insert(new_job(input=stored, params=params, **changes))
    job = await jobs.claim("w", 60, ["restore"])
    assert job is not None
    execution = Execution(
        catalog, jobs, blobs, engine, ImagesHere(), lambda *_: None, Lease(10, 60), RetryPolicy()
    )
    async with asyncio.timeout(300):
        ended = await execution.run(job, EngineOccupancy(EngineSchedule(1)))
    assert ended is not None
    return ended, jobs


@pytest.mark.retry
async def test_an_engine_that_did_not_start_costs_the_job_nothing() -> None:
    """The job is handed back with the reason in its history, though it had only one attempt."""
    job, _ = await _attempt(EngineUnavailable("no engine"), max_attempts=1)
    assert (job.status, job.failed_attempts) == (JobStatus.QUEUED, 0)
    assert [(r.outcome, r.code) for r in job.attempts] == [
        (AttemptOutcome.HANDED_BACK, "engine_unavailable")
    ]
    assert job.available_at > datetime.now(UTC) - timedelta(seconds=30)
    assert job.available_at > job.attempts[0].ended_at


@pytest.mark.retry
@pytest.mark.parametrize("error", [EngineCrashed("it died"), EngineOutOfMemory("no memory")])
async def test_transient_errors_are_charged_and_tried_again(error: EngineError) -> None:
    """The job waits again with one attempt fewer, and another worker is preferred."""
    job, jobs = await _attempt(error, max_attempts=2)
    assert (job.status, job.failed_attempts) == (JobStatus.QUEUED, 1)
    assert jobs.last_worker == {job.id: "w"}


@pytest.mark.retry
async def test_permanent_errors_are_never_tried_again() -> None:
    """A graph that does not validate fails the job at its first attempt."""
    job, _ = await _attempt(EngineRejected("bad graph"), max_attempts=3)
    assert job.failure is not None
    assert (job.status, job.failure.code) == (JobStatus.FAILED, "engine_rejected")


@pytest.mark.retry
@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ("a\0b", "a\N{REPLACEMENT CHARACTER}b"),
        ("half \ud83d", "half ?"),
        ("né\ntwo lines", "né\ntwo lines"),
        ("x" * 5000, "x" * (MAX_MESSAGE_CHARS - 1) + "…"),
    ],
    ids=["NUL", "half a pair", "as it is", "long"],
)
async def test_whatever_a_node_says_can_be_recorded(said: str, stored: str) -> None:
    """Text that Postgres cannot hold is replaced, so the attempt's outcome is still recorded."""
    job, _ = await _attempt(EngineFailed(said))
    assert job.failure == Failure("engine_failed", stored)


@pytest.mark.retry
def test_the_pause_before_a_retry_has_a_bound() -> None:
    """The delay never exceeds `longest_s`, however often a job was handed back."""
    policy = RetryPolicy(first_s=1, longest_s=8)
    assert 0.5 <= policy.delay_s(0) <= 1
    assert all(4 <= policy.delay_s(failures) <= 8 for failures in (3, 100, 5_000))


@pytest.mark.deadlines
async def test_a_shorter_run_limit_ends_the_attempt() -> None:
    """The request's limit applies where it is shorter than the workflow's."""
    job, _ = await _attempt(None, run_limit_s=0.05)
    assert job.failure is not None
    assert (job.status, job.failure.code) == (JobStatus.FAILED, "engine_timeout")
    assert "0.05 s" in job.failure.message


class NoHints(Leadership):
    """Hints that never arrive."""

    def __init__(self) -> None:
        super().__init__("postgresql://nobody@nowhere/none")

    async def wait(self, timeout_s: float) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()


@pytest.mark.deadlines
async def test_the_leader_fails_what_is_overdue() -> None:
    """A job not started in time fails without a worker and gets no ticket."""
    jobs, tickets = MemoryJobStore(), list[AttemptRef]()
    late, _ = await jobs.insert(new_job(queue_limit_s=-1))
    sent = asyncio.Event()

    async def send(ref: AttemptRef, hold_s: float) -> TicketOutcome:
        tickets.append(ref)
        sent.set()
        return TicketOutcome.RAN

    waiting, _ = await jobs.insert(new_job())
    leading = asyncio.create_task(Dispatch(jobs, NoHints(), send, window=4, lease_s=4).lead())
    async with asyncio.timeout(300):
        await sent.wait()
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)
    assert jobs.rows[late.id].status is JobStatus.FAILED
    assert {ref.job_id for ref in tickets} == {waiting.id}
