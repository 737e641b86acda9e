"""Tickets: one for each waiting job, and the handling of those that end badly."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from actors.dispatcher import FIRST_HOLD_S, LONGEST_HOLD_S
from actors.execution.pipeline import TicketOutcome
from persistence.postgres.leadership import hint_of
from restoration.errors import DependencyUnavailable
from restoration.jobs import AttemptRef, JobStatus
from tests.fakes.dispatch import DEADLINE_S, NEVER_S, WINDOW, Bench, Signals
from tests.support.polling import until
from tests.support.samples import new_job

TICK_S = 0.01


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """However the lead ends, no ticket's task is left running."""
    before = asyncio.all_tasks()
    bench = Bench()
    yield bench
    assert bench.leading is not None
    bench.leading.cancel()
    await asyncio.gather(bench.leading, return_exceptions=True)
    assert asyncio.all_tasks() - before <= {asyncio.current_task()}
    assert not bench.workers.out


class TestTickets:
    async def test_each_waiting_job_has_one(self, bench: Bench) -> None:
        """Earlier jobs and those announced later get one; further hints send no second one."""
        first = await bench.submit()
        bench.lead()
        await bench.sent(first)
        second = await bench.submit()
        await bench.sent(first, second)
        third = await bench.submit()
        await bench.sent(first, second, third)
        assert bench.workers.sent == Counter([first, second, third])

    async def test_no_hint_is_needed(self, bench: Bench) -> None:
        """The queue is polled now and then, so a lost notification only delays a job."""
        bench.lead(tick_s=TICK_S)
        job, _ = await bench.jobs.insert(new_job())
        await bench.sent(AttemptRef(job.id, 1))

    @pytest.mark.dispatch
    async def test_an_attempt_that_is_named_needs_no_look_at_the_table(self, bench: Bench) -> None:
        """Its ticket is sent before any read, and only once."""
        bench.lead()
        first = await bench.submit()
        await bench.sent(first)
        unseen = AttemptRef(uuid4(), 1)
        bench.signals.hint(hint_of(unseen))
        bench.signals.hint(hint_of(unseen))
        await bench.sent(first, unseen)
        assert bench.workers.sent == Counter([first, unseen])

    @pytest.mark.dispatch
    async def test_nor_does_it_go_past_the_window(self, bench: Bench) -> None:
        """An attempt that is named while the window is full waits for a place like the others."""
        refs = [await bench.submit() for _ in range(WINDOW)]
        bench.lead()
        await bench.sent(*refs)
        job, _ = await bench.jobs.insert(new_job())
        bench.signals.hint(hint_of(AttemptRef(job.id, 1)))
        other, _ = await bench.jobs.insert(new_job())
        await bench.claim()
        bench.workers.out[refs[0]].set_result(TicketOutcome.RAN)
        await bench.sent(*refs[1:], AttemptRef(job.id, 1))
        assert AttemptRef(other.id, 1) not in bench.workers.sent
        assert bench.workers.most_out == WINDOW

    async def test_no_more_than_the_window_are_out(self, bench: Bench) -> None:
        """The best waiting jobs have tickets; each ticket that ends makes room for the next."""
        refs = [await bench.submit() for _ in range(WINDOW + 2)]
        bench.lead()
        for i in range(3):
            await bench.sent(*refs[i : i + WINDOW])
            await bench.claim()
            bench.workers.out[refs[i]].set_result(TicketOutcome.RAN)
        assert bench.workers.most_out == WINDOW

    async def test_another_attempt_is_another_ticket(self, bench: Bench) -> None:
        """A stuck ticket does not block a job that was queued again."""
        stuck = await bench.submit()
        bench.lead()
        await bench.sent(stuck)
        await bench.jobs.release((await bench.claim()).ref, None)
        bench.signals.hint()
        await bench.sent(stuck, AttemptRef(stuck.job_id, 2))

    async def test_a_job_that_still_waits_gets_a_new_one(self, bench: Bench) -> None:
        """If a worker takes a better job on a job's ticket, that job gets a new one at once."""
        ref = await bench.submit()
        bench.lead()
        await bench.sent(ref)
        bench.workers.out[ref].set_result(TicketOutcome.RAN)
        await until(lambda: bench.workers.sent[ref] == 2)

    @pytest.mark.dispatch
    async def test_tickets_that_found_nothing_keep_nobody_waiting(self, bench: Bench) -> None:
        """A window full of tickets whose jobs others took still has room for a new job."""
        refs = [await bench.submit() for _ in range(WINDOW)]
        bench.lead()
        await bench.sent(*refs)
        for ref in refs:
            await bench.claim()
            bench.workers.out[ref].set_result(TicketOutcome.NOTHING_CLAIMED)
        await bench.sent()
        await bench.sent(await bench.submit())

    async def test_a_job_that_no_worker_takes_is_offered_slowly(self, bench: Bench) -> None:
        """The job may wait for a worker that knows its workflow; until then it must not cause a
        busy loop."""
        ref = await bench.submit()
        bench.lead()  # a tick, and thus a pause, of an hour
        await bench.sent(ref)
        bench.workers.out[ref].set_result(TicketOutcome.NOTHING_CLAIMED)
        await bench.sent()
        other = await bench.submit()
        await bench.sent(other)
        assert bench.workers.sent[ref] == 1

    async def test_and_is_offered_again(self, bench: Bench) -> None:
        """After a tick, a ticket that found no job to claim is followed by another."""
        ref = await bench.submit()
        bench.lead(tick_s=TICK_S)
        await bench.sent(ref)
        bench.workers.out[ref].set_result(TicketOutcome.NOTHING_CLAIMED)
        await until(lambda: bench.workers.sent[ref] == 2)

    @pytest.mark.dispatch
    async def test_a_ticket_that_was_of_no_use_is_offered_again(self, bench: Bench) -> None:
        """It is offered at once, as another worker may be idle, and held longer each time."""
        ref = await bench.submit()
        bench.lead()
        for times in range(1, 9):
            await until(lambda: bench.workers.sent[ref] == times)  # noqa: B023 # run here
            bench.workers.out[ref].set_result(TicketOutcome.BUSY)
        holds_s = bench.workers.holds_s
        assert holds_s[:3] == [FIRST_HOLD_S, 2 * FIRST_HOLD_S, 4 * FIRST_HOLD_S]
        assert holds_s[-1] == LONGEST_HOLD_S

    @pytest.mark.dispatch
    async def test_unless_the_job_waits_no_more(self, bench: Bench) -> None:
        """A cancelled job gets no further ticket."""
        ref = await bench.submit()
        bench.lead()
        await bench.sent(ref)
        await bench.jobs.request_cancel(ref.job_id)
        bench.workers.out[ref].set_result(TicketOutcome.BUSY)
        other = await bench.submit()
        await bench.sent(other)
        assert bench.workers.sent[ref] == 1


def _death(worker: str) -> ActorDiedError:
    death = ActorDiedError()
    death.actor_id = worker
    return death


def _refusal(error: Exception) -> RayTaskError:
    return RayTaskError("process", "a traceback", error)  # type: ignore[no-untyped-call]


class TestBadEnds:
    @pytest.mark.lease
    async def test_a_dead_workers_jobs_are_queued_at_once(self, bench: Bench) -> None:
        """The next attempt's ticket is sent although the leases have an hour left."""
        ref = await bench.submit()
        bench.lead()
        await bench.sent(ref)
        job = await bench.claim(lease_s=NEVER_S)
        bench.workers.out[ref].set_exception(_death("worker-1"))
        await bench.sent(AttemptRef(ref.job_id, 2))
        assert bench.jobs.rows[job.id].failed_attempts == 1

    async def test_other_workers_jobs_are_left_alone(self, bench: Bench) -> None:
        """A worker's death does not affect the jobs of others."""
        ref = await bench.submit()
        bench.lead()
        await bench.sent(ref)
        job = await bench.claim()
        bench.workers.out[ref].set_exception(_death("worker-2"))
        other = await bench.submit()
        await bench.sent(other)
        assert bench.jobs.rows[job.id].status is JobStatus.RUNNING

    async def test_a_death_without_a_name_reclaims_nothing(self, bench: Bench) -> None:
        """To the store, no name would mean every lapsed lease, which may be too early for those."""
        ref = await bench.submit()
        bench.lead()
        await bench.sent(ref)
        job = await bench.claim(lease_s=-1)
        bench.workers.out[ref].set_exception(ActorDiedError())
        other = await bench.submit()
        await bench.sent(other)
        assert bench.jobs.rows[job.id].status is JobStatus.RUNNING

    async def test_a_death_while_postgres_is_away_is_left_to_the_lease(self, bench: Bench) -> None:
        """The ticket ends, and the lead ends at its next look at the table without a crash."""
        ref = await bench.submit()
        leading = bench.lead()
        await bench.sent(ref)
        bench.jobs.down = True
        bench.workers.out[ref].set_exception(_death("worker-1"))
        with pytest.raises(DependencyUnavailable):
            await asyncio.wait_for(leading, DEADLINE_S)

    @pytest.mark.parametrize(
        "error",
        [
            ActorUnavailableError("for a moment", None),
            _refusal(DependencyUnavailable("Postgres: refused")),
            BackPressureError(1, 1),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_a_deployment_that_refuses_tickets_is_not_flooded(
        self, bench: Bench, error: Exception
    ) -> None:
        """Errors of Ray and Serve delay the job by a tick and do not affect others."""
        bench.workers.refuse_with = error
        ref = await bench.submit()
        bench.lead()
        await until(lambda: bench.workers.sent[ref] == 1)
        bench.workers.refuse_with = None
        other = await bench.submit()
        await bench.sent(other)
        assert bench.workers.sent[ref] == 1

    async def test_a_refused_ticket_is_sent_again(self, bench: Bench) -> None:
        """The job gets another ticket at the next tick."""
        bench.workers.refuse_with = BackPressureError(1, 1)
        ref = await bench.submit()
        bench.lead(tick_s=TICK_S)
        await until(lambda: bench.workers.sent[ref] >= 2)
        bench.workers.refuse_with = None
        await bench.sent(ref)


class TestLeading:
    @pytest.mark.lease
    async def test_lapsed_leases_are_queued_again(self, bench: Bench) -> None:
        """A worker that no ticket reports on is found by its lapsed lease."""
        bench.lease_s = 0
        ref = await bench.submit()
        await bench.claim(lease_s=-1)
        bench.lead()
        await bench.sent(AttemptRef(ref.job_id, 2))

    async def test_but_not_before_workers_could_extend_them(self, bench: Bench) -> None:
        """Leases may have lapsed because Postgres was away: each gets one more lease time."""
        await bench.submit()
        lapsed = await bench.claim(lease_s=-1)
        bench.lead(tick_s=TICK_S)
        for _ in range(3):
            ref = await bench.submit()
            await bench.sent(ref)
            await bench.claim()
            bench.workers.out[ref].set_result(TicketOutcome.RAN)
        assert bench.jobs.rows[lapsed.id].status is JobStatus.RUNNING

    @pytest.mark.lease
    async def test_named_attempts_keep_nobody_from_looking(self, bench: Bench) -> None:
        """A delayed retry is found in time even if hints come faster than ticks."""
        now = datetime.now(UTC)
        bench.jobs.clock = lambda: now
        ref = await bench.submit()
        await bench.jobs.release((await bench.claim()).ref, None, delay_s=30)
        bench.lead(tick_s=20 * TICK_S)
        named = AttemptRef(uuid4(), 1)
        bench.signals.hint(hint_of(named))
        await bench.sent(named)
        bench.jobs.clock = lambda: now + timedelta(seconds=30)
        retry = AttemptRef(ref.job_id, 2)
        async with asyncio.timeout(DEADLINE_S):
            while retry not in bench.workers.out:
                bench.signals.hint(hint_of(named))
                await asyncio.sleep(TICK_S)

    async def test_a_delayed_retry_gets_its_ticket_in_time(self, bench: Bench) -> None:
        """The end of a delay is not announced: a tick finds it."""
        now = datetime.now(UTC)
        bench.jobs.clock = lambda: now
        ref = await bench.submit()
        await bench.jobs.release((await bench.claim()).ref, None, delay_s=30)
        bench.lead(tick_s=TICK_S)
        bench.jobs.clock = lambda: now + timedelta(seconds=30)
        await bench.sent(AttemptRef(ref.job_id, 2))

    async def test_losing_the_connection_ends_it(self, bench: Bench) -> None:
        """The lock is lost with the connection, so another leads: this one drops its tickets and
        says so."""
        ref = await bench.submit()
        leading = bench.lead()
        await bench.sent(ref)
        bench.signals.lose()
        with pytest.raises(DependencyUnavailable):
            await asyncio.wait_for(leading, DEADLINE_S)
        assert not bench.workers.out

    async def test_whoever_leads_next_sends_tickets_of_its_own(self, bench: Bench) -> None:
        """The last leader's outstanding tickets ended with its lead."""
        ref = await bench.submit()
        leading = bench.lead()
        await bench.sent(ref)
        bench.signals.lose()
        await asyncio.wait({leading}, timeout=DEADLINE_S)
        leading.exception()
        bench.signals = Signals()
        bench.lead()
        await bench.sent(ref)
        assert bench.workers.sent[ref] == 2
