"""A worker's stages: how many jobs are in hand, and when the next is claimed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.execution import pipeline
from actors.execution.engine_schedule import EngineOccupancy
from actors.execution.loaded_models import LoadedModels
from actors.execution.pipeline import STORING, Pipeline, TicketOutcome
from restoration.errors import DependencyUnavailable, EngineUnavailable
from restoration.jobs import Job, JobStatus, Priority
from restoration.tasks import stop
from tests.fakes.engine import MemoryEngine
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.site import photo
from tests.fakes.stores import MemoryBlobStore
from tests.support.polling import until
from tests.support.samples import new_job
from workflows.catalog import load_catalog

FOR_EVER_S = 3600.0
DEADLINE_S = 300
PIXELS = 100


@dataclass
class Run:
    """A job in hand, which proceeds when a test releases it."""

    job: Job
    occupancy: EngineOccupancy
    end: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    def stage(self, pixels: int = PIXELS) -> None:
        self.occupancy.staged(pixels)

    def begin(self) -> None:
        self.occupancy.began()

    def store(self) -> None:
        self.occupancy.finished()

    def finish(self) -> None:
        for step in (self.stage, self.begin, self.store, self.end.set):
            step()


@dataclass
class Engine(MemoryEngine):
    """An engine whose start calls `on_start`, which can take long or fail."""

    on_start: Callable[[], Awaitable[None]] | None = None

    async def start(self) -> None:
        if self.on_start is not None:
            await self.on_start()


@dataclass
class Bench:
    """A pipeline on fakes, whose jobs proceed when a test wants."""

    depth: int = 1
    jobs: MemoryJobStore = field(default_factory=MemoryJobStore)
    blobs: MemoryBlobStore = field(default_factory=MemoryBlobStore)
    engine: Engine = field(default_factory=lambda: Engine(photo()))
    undrained: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: bool = False  # whether Serve has ordered the replica to stop
    runs: list[Run] = field(default_factory=list)
    tickets: list[asyncio.Task[TicketOutcome]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.undrained.set()
        self.loaded_models = LoadedModels(load_catalog(), self.engine)
        self.pipeline = Pipeline(
            worker="w",
            workflows=["restore"],
            jobs=self.jobs,
            blobs=self.blobs,
            engine=self.engine,
            loaded_models=self.loaded_models,
            run=self._run,
            release=self._release,
            lease_s=60,
            depth=self.depth,
            undrained=self.undrained,
            is_stopping=lambda: self.stopping,
        )

    async def _run(self, job: Job, occupancy: EngineOccupancy) -> Job | None:
        run = Run(job, occupancy)
        self.runs.append(run)
        await run.end.wait()
        if run.error is not None:
            raise run.error
        return self.jobs.rows[job.id]

    async def _release(self, job: Job) -> None:
        await self.jobs.release(job.ref, None)

    async def submit(self, count: int = 1, priority: Priority = Priority.INTERACTIVE) -> None:
        for _ in range(count):
            await self.jobs.insert(new_job(priority=priority))

    def send(self, hold_s: float = FOR_EVER_S) -> asyncio.Task[TicketOutcome]:
        self.tickets.append(asyncio.create_task(self.pipeline.process(hold_s)))
        return self.tickets[-1]

    async def in_hand(self, count: int) -> Run:
        """Return the newest run once there are this many; there are never more."""
        await until(lambda: len(self.runs) >= count)
        await _settle()
        assert len(self.runs) == count
        return self.runs[-1]

    async def aclose(self) -> None:
        await stop(*self.tickets)
        await self.pipeline.hand_back()

    async def execute_one(self) -> None:
        """Let the pipeline learn that a job is quick."""
        await self.submit()
        ticket = self.send()
        (await self.in_hand(len(self.runs) + 1)).finish()
        assert await ticket is TicketOutcome.RAN


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.aclose()


async def _settle() -> None:
    """Let every task that can proceed do so."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.overlap
async def test_the_next_is_claimed_while_one_executes(bench: Bench) -> None:
    """With quick jobs, one executes, one is staged, and a third waits for a place."""
    await bench.execute_one()
    await bench.submit(3)
    for _ in range(3):
        bench.send()
    first = await bench.in_hand(2)
    first.stage()
    first.begin()
    second = await bench.in_hand(3)
    second.stage()
    await _settle()
    assert len(bench.runs) == 3
    first.store()
    second.begin()
    await bench.in_hand(4)


@pytest.mark.overlap
async def test_a_job_of_unknown_length_keeps_others_waiting(bench: Bench) -> None:
    """No job is claimed behind a possibly endless one: it stays free for other workers."""
    await bench.submit(2)
    bench.send()
    bench.send()
    first = await bench.in_hand(1)
    first.stage()
    first.begin()
    await bench.in_hand(1)
    first.store()
    await bench.in_hand(2)


@pytest.mark.overlap
async def test_a_large_job_is_known_to_take_longer_than_a_small_one(bench: Bench) -> None:
    """The picture's size predicts the time: no job is claimed behind a huge one."""
    await bench.execute_one()
    await bench.submit(2)
    bench.send()
    bench.send()
    first = await bench.in_hand(2)
    first.stage(pixels=10**12)
    first.begin()
    await bench.in_hand(2)


@pytest.mark.overlap
async def test_a_result_being_stored_keeps_nobody_waiting(bench: Bench) -> None:
    """The next is claimed once the engine is free, until too many results wait to be stored."""
    await bench.submit(5)
    for _ in range(5):
        bench.send()
    for count in range(1, STORING + 2):
        run = await bench.in_hand(count)
        run.stage()
        run.begin()
        run.store()
    full = await bench.in_hand(STORING + 2)
    full.stage()
    full.begin()
    full.store()
    await bench.in_hand(STORING + 2)
    bench.runs[0].end.set()
    await bench.in_hand(STORING + 3)


@pytest.mark.overlap
async def test_a_failed_neighbour_makes_room(bench: Bench) -> None:
    """However a job ends, its place goes to the next, and its short time is not learned."""
    await bench.submit(3)
    tickets = [bench.send() for _ in range(3)]
    for count in (1, 2, 3):
        run = await bench.in_hand(count)
        run.stage()
        run.begin()
        run.error = ValueError("broke")
        run.end.set()
    outcomes = await asyncio.gather(*tickets, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    assert bench.pipeline.idle


@pytest.mark.overlap
async def test_a_ticket_that_is_of_no_use_goes_back(bench: Bench) -> None:
    """A worker that is busy for long returns it for another; the job was not taken."""
    await bench.submit(2)
    bench.send()
    run = await bench.in_hand(1)
    run.stage()
    run.begin()
    assert await bench.send(hold_s=0.01) is TicketOutcome.BUSY
    assert len(await bench.jobs.waiting(5)) == 1


@pytest.mark.overlap
async def test_a_ticket_serves_while_jobs_wait(bench: Bench) -> None:
    """The jobs follow each other on it."""
    await bench.submit(3)
    ticket = bench.send()
    for count in (1, 2, 3):
        (await bench.in_hand(count)).finish()
    assert await ticket is TicketOutcome.RAN


@pytest.mark.overlap
async def test_a_ticket_that_served_goes_back_when_others_took_the_rest(bench: Bench) -> None:
    """Its outcome is that of the job that it ran."""
    await bench.submit(2)
    ticket = bench.send()
    run = await bench.in_hand(1)
    assert await bench.jobs.claim("another", 60, ["restore"]) is not None
    run.finish()
    assert await ticket is TicketOutcome.RAN
    assert len(bench.runs) == 1


@pytest.mark.overlap
async def test_a_ticket_that_served_goes_back_when_no_claim_is_possible_soon(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held for longer than a new one, but not without a limit."""
    monkeypatch.setattr(pipeline, "_SERVED_HOLD_S", 0.01)
    await bench.submit(2)
    ticket = bench.send()
    run = await bench.in_hand(1)
    bench.undrained.clear()
    run.finish()
    assert await ticket is TicketOutcome.RAN
    assert len(bench.runs) == 1


@pytest.mark.overlap
async def test_a_ticket_goes_back_when_no_other_job_waited(bench: Bench) -> None:
    """No further job is claimed on it: in a short queue, each job has its own ticket."""
    await bench.submit()
    ticket = bench.send()
    run = await bench.in_hand(1)
    await bench.submit()
    run.finish()
    assert await ticket is TicketOutcome.RAN
    assert len(await bench.jobs.waiting(5)) == 1


@pytest.mark.overlap
async def test_a_claim_that_takes_long_is_waited_for(bench: Bench) -> None:
    """An engine that is being started for a job is no reason to return the ticket."""
    started = asyncio.Event()

    async def start_slowly() -> None:
        await started.wait()

    bench.engine.on_start = start_slowly
    ticket = bench.send(hold_s=0.01)
    await asyncio.wait({ticket}, timeout=0.05)
    assert not ticket.done()
    started.set()
    assert await ticket is TicketOutcome.NOTHING_CLAIMED


@pytest.mark.overlap
async def test_what_waits_when_its_time_has_come_is_what_counts(bench: Bench) -> None:
    """A claim is made as late as possible, so it takes the best job of that moment."""
    await bench.submit(2, Priority.BATCH)
    bench.send()
    bench.send()
    first = await bench.in_hand(1)
    first.stage()
    first.begin()
    await _settle()
    await bench.jobs.insert(new_job(owner="bob"))
    first.store()
    assert (await bench.in_hand(2)).job.owner == "bob"


@pytest.mark.drain
async def test_a_ticket_that_is_taken_back_claims_nothing(bench: Bench) -> None:
    """A dispatcher that ends cancels its tickets, but no job that was begun on one."""
    await bench.submit(2)
    running, waiting = bench.send(), bench.send()
    run = await bench.in_hand(1)
    run.stage()
    run.begin()
    for ticket in (running, waiting):
        ticket.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ticket
    assert [job.job_id for job in bench.pipeline.in_hand] == [run.job.id]
    run.finish()
    await until(lambda: not bench.pipeline.in_hand)
    assert len(bench.runs) == 1


@pytest.mark.drain
async def test_a_drained_worker_holds_its_tickets_and_claims_nothing(bench: Bench) -> None:
    """It sends them back in time, and serves them at once when it is undrained."""
    await bench.submit()
    bench.undrained.clear()
    assert await bench.send(hold_s=0.01) is TicketOutcome.BUSY
    bench.send()
    await _settle()
    assert not bench.runs
    bench.undrained.set()
    await bench.in_hand(1)


@pytest.mark.drain
@pytest.mark.parametrize("order", ["drained", "stopping"])
async def test_a_worker_that_is_told_to_stop_while_its_engine_starts_takes_no_job(
    bench: Bench, order: str
) -> None:
    """The operator or Serve may stop it; a start takes minutes, and a job would be handed back."""

    async def stop_meanwhile() -> None:
        if order == "drained":
            bench.undrained.clear()
        bench.stopping = order == "stopping"

    bench.engine.on_start = stop_meanwhile
    await bench.submit()
    assert await bench.send() is TicketOutcome.NOTHING_CLAIMED
    assert len(await bench.jobs.waiting(5)) == 1


@pytest.mark.engine_health
async def test_no_job_is_claimed_for_an_engine_that_does_not_start(bench: Bench) -> None:
    """The job waits for another worker; with an engine it is claimed."""

    async def fail() -> None:
        raise EngineUnavailable("no GPU")

    bench.engine.on_start = fail
    await bench.submit()
    assert await bench.send() is TicketOutcome.NOTHING_CLAIMED
    assert len(await bench.jobs.waiting(5)) == 1
    bench.engine.on_start = None
    bench.send()
    await bench.in_hand(1)


@pytest.mark.retry
async def test_after_a_failed_attempt_none_is_claimed_until_s3_answers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage of S3 does not cost each waiting job an attempt."""
    monkeypatch.setattr(pipeline, "_STORE_PAUSE_S", 0.01)
    await bench.submit(2)
    bench.send()
    run = await bench.in_hand(1)
    bench.blobs.down = True
    await bench.jobs.release(run.job.ref, None, delay_s=60)
    run.finish()
    await asyncio.sleep(0.05)
    await bench.in_hand(1)
    bench.blobs.down = False
    await bench.in_hand(2)


@pytest.mark.drain
@pytest.mark.parametrize("order", ["drained", "stopping"])
async def test_a_worker_that_is_told_to_stop_while_s3_is_away_returns_its_tickets(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """An open ticket would keep it for as long as the outage lasts."""
    monkeypatch.setattr(pipeline, "_STORE_PAUSE_S", 0.01)
    await bench.submit(2)
    ticket = bench.send()
    run = await bench.in_hand(1)
    asked = asyncio.Event()

    async def be_away() -> None:
        asked.set()
        raise DependencyUnavailable("S3 is away")

    monkeypatch.setattr(bench.blobs, "ping", be_away)
    await bench.jobs.release(run.job.ref, None, delay_s=60)
    run.finish()
    await asked.wait()
    if order == "drained":
        bench.undrained.clear()
    bench.stopping = order == "stopping"
    async with asyncio.timeout(DEADLINE_S):
        assert await ticket is TicketOutcome.RAN
    assert len(bench.runs) == 1


@pytest.mark.drain
async def test_a_job_that_is_being_claimed_is_handed_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction of a claim commits although the claim is cancelled."""
    begun, may_commit = asyncio.Event(), asyncio.Event()
    claim = bench.jobs.claim

    async def claim_slowly(*arguments: Any) -> Job | None:
        async def transaction() -> Job | None:
            await may_commit.wait()
            return await claim(*arguments)

        begun.set()
        return await asyncio.shield(asyncio.create_task(transaction()))

    monkeypatch.setattr(bench.jobs, "claim", claim_slowly)
    await bench.submit()
    bench.send()
    await begun.wait()
    handing_back = asyncio.create_task(bench.pipeline.hand_back())
    await _settle()
    may_commit.set()
    await handing_back
    await _settle()
    assert not bench.runs
    (row,) = bench.jobs.rows.values()
    assert (row.status, row.attempt, row.failed_attempts) == (JobStatus.QUEUED, 1, 0)


@pytest.mark.drain
async def test_jobs_in_hand_are_handed_back_at_no_cost(bench: Bench) -> None:
    """They wait again, and what still runs of them is stopped."""
    await bench.submit()
    ticket = bench.send()
    run = await bench.in_hand(1)
    await bench.pipeline.hand_back()
    assert ticket.cancelled() or ticket.done()
    row = bench.jobs.rows[run.job.id]
    assert (row.status, row.failed_attempts) == (JobStatus.QUEUED, 0)
    assert bench.pipeline.idle


@pytest.mark.overlap
async def test_depth_is_how_many_are_staged() -> None:
    """With none, no job is claimed before the engine is free; with two, two are."""
    for depth in (0, 2):
        bench = Bench(depth)
        await bench.execute_one()
        await bench.submit(4)
        for _ in range(4):
            bench.send()
        for count in range(2, depth + 2):
            (await bench.in_hand(count)).stage()
        await bench.in_hand(depth + 2)
        await bench.aclose()
