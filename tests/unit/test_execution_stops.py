"""Events that stop an attempt or keep it from its row: cancels, lost leases, outages, shutdowns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import pytest

from actors.execution.outcomes import RetryPolicy
from restoration.jobs import Artifact, AttemptRef, JobStatus
from tests.fakes.execution import NOW, Bench, open_bench
from tests.support.polling import until


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with open_bench() as bench:
        yield bench


class TestCancel:
    @pytest.mark.cancel
    async def test_a_running_job_is_interrupted(self, bench: Bench) -> None:
        """A heartbeat brings the cancel, the engine is interrupted, the job ends as cancelled."""
        job = await bench.claimed()
        task = await bench.start(job)
        await bench.jobs.request_cancel(job.id)
        ended = await task
        assert ended is not None
        assert (ended.status, ended.failed_attempts) == (JobStatus.CANCELLED, 0)
        assert bench.engine.interrupted == {run.id for run in bench.engine.runs}
        assert bench.states()[0] is JobStatus.RUNNING
        assert set(bench.states()[1:-1]) == {JobStatus.CANCELLING}
        assert bench.states()[-1] is JobStatus.CANCELLED
        assert not bench.outputs()

    @pytest.mark.cancel
    async def test_a_cancel_before_the_engine_has_the_run_is_not_lost(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The interrupt is repeated with each heartbeat until there is a run to interrupt."""
        fetched = asyncio.Event()
        get = bench.blobs.get

        async def get_slowly(artifact: Artifact) -> bytes:
            await fetched.wait()
            return await get(artifact)

        monkeypatch.setattr(bench.blobs, "get", get_slowly)
        bench.engine.go_on.clear()
        job = await bench.claimed()
        await bench.jobs.request_cancel(job.id)
        task = asyncio.create_task(bench.run(job))
        await until(lambda: JobStatus.CANCELLING in bench.states())
        fetched.set()
        ended = await task
        assert ended is not None
        assert ended.status is JobStatus.CANCELLED

    async def test_a_job_that_finishes_first_stays_finished(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A cancel that comes while the result is being stored changes nothing."""
        job = await bench.claimed()
        put = bench.blobs.put

        async def put_late(key: str, data: bytes, content_type: str) -> Artifact:
            await bench.jobs.request_cancel(job.id)
            await until(lambda: JobStatus.CANCELLING in bench.states())
            return await put(key, data, content_type)

        monkeypatch.setattr(bench.blobs, "put", put_late)
        ended = await bench.run(job)
        assert ended is not None
        assert ended.status is JobStatus.SUCCEEDED

    @pytest.mark.parametrize("step", ["prepare", "encode"])
    async def test_a_picture_that_takes_for_ever_is_cancelled(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        """Reading and writing a picture is aborted like the engine's run."""
        held = Held()
        monkeypatch.setattr(bench.images, step, held)
        job = await bench.claimed()
        task = asyncio.create_task(bench.run(job))
        await held.begun.wait()
        await bench.jobs.request_cancel(job.id)
        ended = await task
        assert ended is not None
        assert (ended.status, ended.failed_attempts) == (JobStatus.CANCELLED, 0)
        assert held.given_up
        assert not bench.outputs()

    @pytest.mark.parametrize("step", ["prepare", "encode"])
    async def test_a_picture_that_takes_for_ever_is_within_the_run_limit(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        held = Held()
        monkeypatch.setattr(bench.images, step, held)
        job = await bench.claimed(run_limit_s=0.5)
        ended = await bench.run(job)
        assert ended is not None
        assert ended.failure is not None
        assert ended.failure.code == "engine_timeout"
        assert held.given_up


class Held:
    """A call that never returns, and records its cancellation."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.given_up = False

    async def __call__(self, *arguments: object, **options: object) -> NoReturn:
        self.begun.set()
        try:
            await asyncio.Event().wait()
            raise AssertionError("nothing sets the event")
        except asyncio.CancelledError:
            self.given_up = True
            raise


class TestLease:
    async def test_it_is_kept_while_the_engine_works(self, bench: Bench) -> None:
        """Heartbeats extend the lease for as long as the attempt lasts, and end with it."""
        later = NOW + timedelta(seconds=30)
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.clock = lambda: later
        await until(lambda: bench.row(job).lease_until == later + timedelta(seconds=60))
        bench.engine.go_on.set()
        await task

    @pytest.mark.lease
    async def test_who_loses_it_stops_at_once(self, bench: Bench) -> None:
        """The engine's run is stopped; no object, row or end is written."""
        job = await bench.claimed()
        task = await bench.start(job)
        anothers = replace(bench.row(job), attempt=2, worker="worker-2")
        bench.jobs.rows[job.id] = anothers
        assert await task is None
        assert bench.engine.stopped == [run.id for run in bench.engine.runs]
        assert bench.row(job) == anothers
        assert bench.states() == [JobStatus.RUNNING]
        assert not bench.outputs()

    @pytest.mark.lease
    async def test_who_lost_it_unnoticed_changes_nothing(self, bench: Bench) -> None:
        """A result that comes after another attempt has begun is rejected."""
        job = await bench.claimed()
        anothers = replace(bench.row(job), attempt=2, worker="worker-2")
        bench.jobs.rows[job.id] = anothers
        assert await bench.run(job) is None
        assert bench.row(job) == anothers
        assert bench.states() == [JobStatus.RUNNING]

    async def test_missed_heartbeats_stop_nothing(self, bench: Bench) -> None:
        """While Postgres is away the attempt goes on, and succeeds if it is back in time."""
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.down = True
        missed_from = bench.jobs.beats
        await until(lambda: bench.jobs.beats >= missed_from + 3)
        bench.jobs.down = False
        bench.engine.go_on.set()
        ended = await task
        assert ended is not None
        assert ended.status is JobStatus.SUCCEEDED


class TestRecording:
    async def test_an_outcome_waits_for_postgres(self, bench: Bench) -> None:
        """A result is recorded once Postgres is back; the engine's work is not lost."""
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.down = True
        bench.engine.go_on.set()
        await until(lambda: bench.jobs.writes >= 3)
        assert not task.done()
        bench.jobs.down = False
        ended = await task
        assert ended is not None
        assert ended.status is JobStatus.SUCCEEDED
        assert len(bench.engine.runs) == 1

    async def test_it_does_not_wait_for_ever(self, bench: Bench) -> None:
        """When Postgres stays away the job is left to its lease, and the worker goes on."""
        bench.retry = RetryPolicy(first_s=0.01, record_s=0.03)
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.down = True
        bench.engine.go_on.set()
        assert await task is None
        assert bench.row(job).status is JobStatus.RUNNING
        assert bench.states() == [JobStatus.RUNNING]


class TestShutdown:
    async def test_the_job_is_handed_back_without_a_mark(self, bench: Bench) -> None:
        """Cancelling the worker stops its engine and requeues the job at once, uncharged."""
        job = await bench.claimed()
        task = await bench.start(job)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        row = bench.row(job)
        assert (row.status, row.failed_attempts, row.worker) == (JobStatus.QUEUED, 0, None)
        assert bench.states() == [JobStatus.RUNNING, JobStatus.QUEUED]
        assert bench.ends == bench.told_rows == [row]
        assert await bench.jobs.waiting(1) == [AttemptRef(job.id, 2)]
        assert bench.engine.stopped == [run.id for run in bench.engine.runs]

    async def test_the_lease_is_kept_while_the_engine_stops(self, bench: Bench) -> None:
        """An engine may take longer to stop than the lease lasts; its worker is still alive."""
        bench.engine.may_stop.clear()
        job = await bench.claimed()
        task = await bench.start(job)
        task.cancel()
        await until(lambda: task.cancelling() > 0)
        seen = bench.jobs.beats
        await until(lambda: bench.jobs.beats >= seen + 3)
        bench.engine.may_stop.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.row(job).status is JobStatus.QUEUED

    async def test_an_outcome_that_is_being_recorded_is_recorded(self, bench: Bench) -> None:
        """A worker that is stopped while it has a result delivers it first."""
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.down = True
        bench.engine.go_on.set()
        await until(lambda: bench.jobs.writes >= 1)
        task.cancel()
        seen = bench.jobs.writes
        await until(lambda: bench.jobs.writes > seen + 1)
        assert bench.jobs.releases == 0  # a result must not race with its own job's return
        bench.jobs.down = False
        with pytest.raises(asyncio.CancelledError):
            await task
        row = bench.row(job)
        assert row.status is JobStatus.SUCCEEDED
        assert bench.states() == [JobStatus.RUNNING, JobStatus.SUCCEEDED]
        assert bench.ends == bench.told_rows == [row]

    async def test_a_job_that_is_released_before_it_stops_is_published_at_once(
        self, bench: Bench
    ) -> None:
        """Its watchers need not wait for the engine, and the attempt counts as handed back."""
        bench.engine.may_stop.clear()
        job = await bench.claimed()
        task = await bench.start(job)
        await bench.execution.release(job)
        row = bench.row(job)
        assert (row.status, row.failed_attempts, row.worker) == (JobStatus.QUEUED, 0, None)
        assert bench.told_rows == [row]
        task.cancel()
        bench.engine.may_stop.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.states() == [JobStatus.RUNNING, JobStatus.QUEUED]
        assert bench.ends == [row]

    async def test_a_job_that_has_ended_is_not_released(self, bench: Bench) -> None:
        """Its outcome stays."""
        job = await bench.claimed()
        ended = await bench.run(job)
        await bench.execution.release(job)
        assert bench.row(job) == ended

    async def test_nothing_but_the_cancellation_comes_out(self, bench: Bench) -> None:
        """Neither a lost lease nor an absent Postgres replaces the cancellation."""
        bench.retry = RetryPolicy(first_s=0.01, record_s=0.03)
        for down in (False, True):
            job = await bench.claimed()
            bench.engine.running.clear()
            task = await bench.start(job)
            bench.jobs.rows[job.id] = replace(bench.row(job), attempt=2)
            bench.jobs.down = down
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
