"""A worker's reports to the status actor, and the watchers woken when a job ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from ray.exceptions import ActorUnavailableError

from actors.status_actor import ProgressReporter, Watchers, WireEvent
from restoration.events import JobEvent, Previewed, Progressed, StateChanged, from_json
from restoration.jobs import JobStatus
from restoration.tasks import stop
from tests.fakes.stores import MemoryStatusBoard
from tests.support.polling import until
from tests.support.samples import ended_job

DEADLINE_S = 300
NEVER_S = 3600.0
JOB = uuid4()
RUNNING = StateChanged(JobStatus.RUNNING, 1)
SUCCEEDED = StateChanged(JobStatus.SUCCEEDED, 1)


class FakeActor:
    """The handle's `publish.remote`: a call lasts until `let_go`, and fails if `error` is set."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[UUID, JobEvent]]] = []
        self.error: Exception | None = None
        self.in_flight = self.most_in_flight = 0
        self.let_go = asyncio.Event()
        self.let_go.set()

    @property
    def publish(self) -> FakeActor:
        return self

    async def remote(self, events: Sequence[WireEvent]) -> None:
        self.batches.append([(UUID(job_id), from_json(text)) for job_id, text in events])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.let_go.wait()
            if self.error is not None:
                raise self.error
        finally:
            self.in_flight -= 1

    def events(self, job_id: UUID = JOB) -> list[JobEvent]:
        return [event for batch in self.batches for id_, event in batch if id_ == job_id]


@pytest.fixture
def actor() -> FakeActor:
    return FakeActor()


@pytest.fixture
def board() -> MemoryStatusBoard:
    return MemoryStatusBoard()


@pytest.fixture
async def report(
    actor: FakeActor, board: MemoryStatusBoard, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ProgressReporter]:
    """Return a reporter that resends after an hour at the earliest, unless an event is urgent."""
    monkeypatch.setattr(ProgressReporter, "PERIOD_S", NEVER_S)
    async with _running(actor, board) as reporter:
        yield reporter


@asynccontextmanager
async def _running(actor: FakeActor, board: MemoryStatusBoard) -> AsyncIterator[ProgressReporter]:
    reporter = ProgressReporter(cast("Any", actor), board)
    task = asyncio.create_task(reporter.run())
    yield reporter
    await stop(task)
    await reporter.aclose()


def _progress(fraction: float, attempt: int = 1) -> Progressed:
    return Progressed(fraction, "sampling", attempt)


class TestReporter:
    async def test_the_first_event_goes_out_at_once(
        self, actor: FakeActor, report: ProgressReporter
    ) -> None:
        """The start of a job is not delayed by a period."""
        report(JOB, RUNNING)
        await until(lambda: actor.events() == [RUNNING])

    async def test_one_call_is_in_flight_at_most(
        self, actor: FakeActor, report: ProgressReporter
    ) -> None:
        """However slow the actor is, a worker adds no second call, not even for an end."""
        actor.let_go.clear()
        report(JOB, RUNNING)
        await until(lambda: actor.in_flight == 1)
        for other in (uuid4(), uuid4()):
            report(other, SUCCEEDED)
        actor.let_go.set()
        await until(lambda: len(actor.batches) == 2)
        assert actor.most_in_flight == 1
        assert len(actor.batches[1]) == 2

    async def test_between_calls_only_the_newest_progress_is_kept(
        self, actor: FakeActor, report: ProgressReporter
    ) -> None:
        """For each job the last progress and the last preview are sent, in the order they came."""
        other = uuid4()
        report(JOB, RUNNING)
        await until(lambda: len(actor.batches) == 1)
        preview = Previewed.from_bytes(b"2", "image/jpeg", 1)
        report(JOB, Previewed.from_bytes(b"1", "image/jpeg", 1))
        report(JOB, _progress(0.1))
        report(JOB, preview)
        report(other, _progress(0.2))
        report(JOB, _progress(0.3))
        report(JOB, SUCCEEDED)
        await until(lambda: len(actor.batches) == 2)
        assert actor.batches[1] == [
            (JOB, preview),
            (other, _progress(0.2)),
            (JOB, _progress(0.3)),
            (JOB, SUCCEEDED),
        ]

    async def test_every_state_is_kept(self, actor: FakeActor, report: ProgressReporter) -> None:
        """An attempt that was handed back is not hidden by one that soon follows."""
        states = [
            StateChanged(JobStatus.RUNNING, 1),
            StateChanged(JobStatus.QUEUED, 1),
            StateChanged(JobStatus.RUNNING, 2),
            StateChanged(JobStatus.SUCCEEDED, 2),
        ]
        report(uuid4(), RUNNING)
        await until(lambda: len(actor.batches) == 1)
        for state in states:
            report(JOB, state)
        await until(lambda: actor.events() == states)

    async def test_the_end_is_sent_at_once(
        self, actor: FakeActor, report: ProgressReporter
    ) -> None:
        """Progress waits for its period; a job's end does not, and takes pending progress along."""
        report(JOB, RUNNING)
        await until(lambda: len(actor.batches) == 1)
        report(JOB, _progress(0.5))
        report(JOB, SUCCEEDED)
        await until(lambda: actor.events() == [RUNNING, _progress(0.5), SUCCEEDED])

    @pytest.mark.progress
    async def test_the_end_is_on_the_board_whatever_the_actor_does(
        self, actor: FakeActor, board: MemoryStatusBoard, report: ProgressReporter
    ) -> None:
        """Waiting clients see the end even if the actor is slow; only ends bypass the actor."""
        actor.let_go.clear()
        report(JOB, RUNNING)
        report(JOB, _progress(0.5))
        await until(lambda: actor.in_flight == 1)
        report(JOB, SUCCEEDED, row := ended_job(id=JOB))
        await until(lambda: JOB in board.streams)
        assert [(told.event, told.row) for told in board.streams[JOB]] == [(SUCCEEDED, row)]

    @pytest.mark.progress
    async def test_a_job_that_was_handed_back_has_not_ended(
        self, actor: FakeActor, board: MemoryStatusBoard, report: ProgressReporter
    ) -> None:
        """Its row is not published, because it will change."""
        queued = StateChanged(JobStatus.QUEUED, 1)
        report(JOB, queued, ended_job(id=JOB, status=JobStatus.QUEUED))
        await until(lambda: actor.events() == [queued])
        assert board.streams == {}

    @pytest.mark.progress
    async def test_without_a_board_the_actor_is_told_all_the_same(
        self, actor: FakeActor, board: MemoryStatusBoard, report: ProgressReporter
    ) -> None:
        """A Redis that the worker cannot reach fails neither the worker nor its report."""
        board.down = True
        report(JOB, SUCCEEDED, ended_job(id=JOB))
        await until(lambda: actor.events() == [SUCCEEDED])

    @pytest.mark.progress
    async def test_a_job_that_is_soon_over_is_told_of_once(
        self, actor: FakeActor, report: ProgressReporter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The running state goes with the next event: a call each would cost more than the job."""
        monkeypatch.setattr(report, "LINGER_S", NEVER_S)
        story: list[JobEvent] = [RUNNING, _progress(0.5), SUCCEEDED]
        for event in story:
            report(JOB, event)
            await asyncio.sleep(0.01)
        await until(lambda: actor.batches == [[(JOB, event) for event in story]])

    async def test_progress_goes_out_after_the_period(
        self, actor: FakeActor, report: ProgressReporter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Events between two calls are sent with the next, though none is urgent."""
        monkeypatch.setattr(report, "PERIOD_S", 0.01)
        report(JOB, _progress(0.1))
        await until(lambda: actor.events() == [_progress(0.1)])
        report(JOB, _progress(0.2))
        await until(lambda: actor.events() == [_progress(0.1), _progress(0.2)])

    async def test_a_failing_actor_never_fails_the_worker(
        self, actor: FakeActor, report: ProgressReporter
    ) -> None:
        """Events that it did not accept are lost; later ones are sent as usual."""
        actor.error = ActorUnavailableError("for a moment", None)
        report(JOB, RUNNING)
        await until(lambda: len(actor.batches) == 1)
        actor.error = None
        report(JOB, SUCCEEDED)
        await until(lambda: len(actor.batches) == 2)
        assert actor.batches[1] == [(JOB, SUCCEEDED)]

    async def test_closing_it_waits_for_no_actor(self, actor: FakeActor) -> None:
        """A worker that is stopped does not hang on an actor that does not answer."""
        before = asyncio.all_tasks()
        async with asyncio.timeout(DEADLINE_S), _running(actor, MemoryStatusBoard()) as reporter:
            actor.let_go.clear()
            reporter(JOB, RUNNING)
            await until(lambda: actor.in_flight == 1)
        assert asyncio.all_tasks() == before


class TestWatchers:
    async def test_the_end_of_any_of_the_jobs_wakes_up(self) -> None:
        """A watcher of several jobs is woken when the first has ended."""
        watchers, other = Watchers(), uuid4()
        waiting = asyncio.create_task(watchers.wait([JOB, other], NEVER_S))
        await asyncio.sleep(0)
        watchers.wake([uuid4()])
        watchers.wake([other])
        await asyncio.wait_for(waiting, DEADLINE_S)

    async def test_it_may_be_called_from_another_loop(self) -> None:
        """Publishers and watchers each have an event loop of their own in the actor."""
        watchers = Watchers()
        waiting = asyncio.create_task(watchers.wait([JOB], NEVER_S))
        await asyncio.sleep(0)
        await asyncio.to_thread(watchers.wake, [JOB])
        await asyncio.wait_for(waiting, DEADLINE_S)

    async def test_waiting_has_an_end(self) -> None:
        """After its time a watcher returns to read the row; a job may be named twice."""
        await asyncio.wait_for(Watchers().wait([JOB, JOB], 0.01), DEADLINE_S)

    async def test_nobody_needs_to_wait(self) -> None:
        """An end without watchers is not an error, before the first watcher and after the last."""
        watchers = Watchers()
        watchers.wake([JOB])
        await watchers.wait([JOB], 0.01)
        watchers.wake([JOB])
        await asyncio.sleep(0)
