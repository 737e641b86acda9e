"""A worker's stages: how many jobs are in hand, and when the next is claimed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from actors.execution.attempt import EngineOccupancy
from actors.execution.pipeline import BUSY, NOTHING_WAITS, STORING, Pipeline, one_after_another
from restoration.jobs import Job
from tests.fakes.job_store import MemoryJobStore
from tests.support.polling import until
from tests.support.samples import new_job

DEADLINE_S = 300
FOR_EVER_S = 3600.0
PIXELS = 100


@dataclass
class Run:
    """A job in hand, which proceeds when a test releases it."""

    job: Job
    visit: EngineOccupancy
    end: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    def stage(self, pixels: int = PIXELS) -> None:
        self.visit.staged(pixels)

    def begin(self) -> None:
        self.visit.began()

    def store(self) -> None:
        self.visit.left()


@dataclass
class Bench:
    depth: int = 1
    jobs: MemoryJobStore = field(default_factory=MemoryJobStore)
    runs: list[Run] = field(default_factory=list)
    tickets: list[asyncio.Task[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pipeline = Pipeline(self._claim, self._run, self.depth)

    async def _claim(self) -> Job | None:
        return await self.jobs.claim("w", 60, ["restore"])

    async def _run(self, job: Job, visit: EngineOccupancy) -> str:
        run = Run(job, visit)
        self.runs.append(run)
        await run.end.wait()
        if run.error is not None:
            raise run.error
        return "done"

    async def submit(self, count: int = 1) -> None:
        for _ in range(count):
            await self.jobs.insert(new_job())

    def send(self, hold_s: float = FOR_EVER_S) -> asyncio.Task[str]:
        self.tickets.append(asyncio.create_task(self.pipeline.process(hold_s)))
        return self.tickets[-1]

    async def in_hand(self, count: int) -> Run:
        """Return the newest run once there are this many; there are never more."""
        await until(lambda: len(self.runs) >= count)
        await _settle()
        assert len(self.runs) == count
        return self.runs[-1]

    async def execute_one(self) -> None:
        """Let the pipeline learn that a job is quick."""
        await self.submit()
        ticket = self.send()
        run = await self.in_hand(len(self.runs) + 1)
        for step in (run.stage, run.begin, run.store):
            step()
        run.end.set()
        assert await ticket == "done"


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    for ticket in bench.tickets:
        ticket.cancel()
    await asyncio.gather(*bench.tickets, return_exceptions=True)


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
    assert await bench.send(hold_s=0.01) == BUSY
    assert len(await bench.jobs.waiting(5)) == 1


@pytest.mark.overlap
@pytest.mark.parametrize("at_last", [NOTHING_WAITS, BUSY])
async def test_a_ticket_serves_while_jobs_wait(at_last: str) -> None:
    """Jobs follow each other until none is available soon; the ticket reports the last outcome."""
    left = ["succeeded", "failed", at_last, "too many"]

    async def process(_hold_s: float) -> str:
        return left.pop(0)

    assert await one_after_another(process, 1.0, lambda: True) == "failed"
    assert left == ["too many"]


@pytest.mark.overlap
@pytest.mark.parametrize("outcome", ["succeeded", NOTHING_WAITS, BUSY])
async def test_a_ticket_goes_back_when_no_other_job_waited(outcome: str) -> None:
    """No further job is claimed on it: in a short queue, each job has its own ticket."""
    holds_s: list[float] = []

    async def process(hold_s: float) -> str:
        holds_s.append(hold_s)
        return outcome

    assert await one_after_another(process, 1.0, lambda: False) == outcome
    assert holds_s == [1.0]


@pytest.mark.overlap
async def test_a_claim_that_takes_long_is_waited_for(bench: Bench) -> None:
    """An engine that is being started for a job is no reason to return the ticket."""
    claim, started = bench._claim, asyncio.Event()

    async def claim_slowly() -> Job | None:
        await started.wait()
        return await claim()

    bench.pipeline = Pipeline(claim_slowly, bench._run, depth=1)
    ticket = bench.send(hold_s=0.01)
    await asyncio.wait({ticket}, timeout=0.05)
    assert not ticket.done()
    started.set()
    assert await ticket == NOTHING_WAITS


@pytest.mark.overlap
async def test_what_waits_when_its_time_has_come_is_what_counts(bench: Bench) -> None:
    """A claim is made as late as possible, so it takes the best job of that moment."""
    await bench.submit(2)
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
        bench.pipeline.withdraw(ticket)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    run.store()
    run.end.set()
    assert await running == "done"
    assert len(bench.runs) == 1


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
        for ticket in bench.tickets:
            ticket.cancel()
        await asyncio.gather(*bench.tickets, return_exceptions=True)
