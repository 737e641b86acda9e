"""Point 9: who sees whose usage, and the usage that executions record."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
import typer

from actors.execution.attempt import Execution, Lease
from actors.execution.engine_schedule import EngineOccupancy, EngineSchedule
from actors.execution.outcomes import RetryPolicy
from actors.execution.usage import UsageRecorder
from actors.observability.observers import MetricsObserver, Observers
from restoration.errors import EngineCrashed, EngineUnavailable
from restoration.jobs import Job, JobStatus
from restoration.observability.metrics import GPU_BUSY
from restoration.observability.usage import Cost
from restoration.tasks import stop
from serve_app.auth.scopes import USER_SCOPES, Scope
from serve_app.cli.usage import parse_since
from tests.fakes.engine import MemoryEngine
from tests.fakes.images import ImagesHere
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.meter import MemoryMeter
from tests.fakes.site import open_site, photo
from tests.fakes.stores import MemoryBlobStore
from tests.fakes.usage import MemoryUsageLedger
from tests.support.polling import until
from tests.support.samples import new_job
from workflows.catalog import load_catalog

PATH = "/api/v1/usage"
DEADLINE_S = 300
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@pytest.mark.usage
async def test_an_owner_sees_its_own_and_an_admin_everybodys() -> None:
    """Usage is given by owner and workflow; without `since`, of the last 30 days."""
    async with open_site() as site:
        for owner, gpu_s in (("ann", 2.0), ("bob", 3.0)):
            job, _ = await site.jobs.insert(new_job(owner=owner))
            await site.ledger.record([Cost(job, gpu_s)])
        async with site.client("ann") as client:
            own = (await client.get(PATH)).json()
        async with site.client("root", [Scope.ADMIN]) as client:
            of_all = (await client.get(PATH)).json()
    assert [(each["owner"], each["gpu_s"]) for each in own["usage"]] == [("ann", 2.0)]
    assert [each["owner"] for each in of_all["usage"]] == ["bob", "ann"]


@pytest.mark.usage
@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ("2000-01-01T00:00:00Z", 200),
        ("2000-01-01T00:00:00", 200),
        ("2000-01-01", 200),
        ("yesterday", 422),
    ],
)
async def test_since_is_a_moment(since: str, expected: int) -> None:
    """ISO 8601, UTC without an offset; any other text is malformed."""
    async with open_site() as site, site.client("ann", USER_SCOPES) as client:
        answer = await client.get(PATH, params={"since": since})
    assert answer.status_code == expected
    if expected == 200:
        assert datetime.fromisoformat(answer.json()["since"]) == LONG_AGO


@pytest.mark.usage
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12h", datetime(2026, 11, 22, 0, tzinfo=UTC)),
        ("7d", datetime(2026, 11, 15, 12, tzinfo=UTC)),
        ("4w", datetime(2026, 10, 25, 12, tzinfo=UTC)),
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T10:00+01:00", datetime(2026, 11, 1, 9, tzinfo=UTC)),
    ],
)
def test_since_on_the_command_line(text: str, expected: datetime) -> None:
    """A duration before now, or a day of this machine's calendar."""
    assert parse_since(text, datetime(2026, 11, 22, 12, tzinfo=UTC)) == expected


@pytest.mark.usage
@pytest.mark.parametrize("text", ["", "7", "7x", "d7", "-1d", "2026-13-01", "999999d"])
def test_since_that_is_neither_is_refused(text: str) -> None:
    """The refusal lists the two possible forms."""
    with pytest.raises(typer.BadParameter, match="2026-11-01"):
        parse_since(text, datetime(2026, 11, 22, 12, tzinfo=UTC))


class Bench:
    """An execution on fakes with a configurable engine time."""

    def __init__(self, ledger: MemoryUsageLedger | None = None) -> None:
        self.ledger = ledger or MemoryUsageLedger()
        self.book = UsageRecorder(self.ledger, every_s=0.01)
        self.meter = MemoryMeter()
        self.jobs, self.blobs = MemoryJobStore(), MemoryBlobStore()
        self.engine = MemoryEngine(photo())
        self.execution = Execution(
            load_catalog(),
            self.jobs,
            self.blobs,
            self.engine,
            ImagesHere(),
            lambda *_: None,
            Lease(heartbeat_s=0.01, lease_s=60),
            RetryPolicy(first_s=0, longest_s=0),
            observer=Observers(self.book, MetricsObserver(self.meter)),
        )

    async def insert(self) -> None:
        stored = await self.blobs.put("inputs/1.png", photo(), "image/png")
        params = load_catalog().find("restore").resolve({})
        await self.jobs.insert(new_job(input=stored, params=params))

    async def attempt(self) -> Job | None:
        # each attempt on another worker: one that has failed is passed over for a while
        job = await self.jobs.claim(str(uuid4()), 60, ["restore"])
        assert job is not None
        async with asyncio.timeout(DEADLINE_S):
            return await self.execution.run(job, EngineOccupancy(EngineSchedule(1)))

    async def gpu_s(self) -> float:
        """Return the ledger's GPU seconds once all is written."""
        await self.book.write()
        return sum(usage.gpu_s for usage in await self.ledger.since(LONG_AGO))


@pytest.mark.usage
async def test_an_attempt_that_fails_costs_as_one_that_succeeds() -> None:
    """Three attempts, two of them failures after the engine had begun, make three rows and one job,
    and the metric has the same sum."""
    bench = Bench()
    await bench.insert()
    for error in (EngineCrashed("it died"), EngineCrashed("again"), None):
        bench.engine.error = error
        ended = await bench.attempt()
    assert ended is not None
    assert ended.status is JobStatus.SUCCEEDED
    await bench.book.write()
    [usage] = await bench.ledger.since(LONG_AGO)
    assert (usage.jobs, usage.attempts) == (1, 3)
    assert usage.gpu_s == pytest.approx(bench.meter.counted(GPU_BUSY))


@pytest.mark.usage
async def test_an_attempt_that_never_executed_costs_nothing() -> None:
    bench = Bench()
    await bench.insert()

    async def refuse(*_: object) -> bytes:
        raise EngineUnavailable("no engine")

    bench.engine.run = refuse  # type: ignore[method-assign,assignment]
    await bench.attempt()
    await bench.book.write()
    assert bench.ledger.costs == {}


@pytest.mark.usage
async def test_waiting_for_the_engines_turn_costs_nothing() -> None:
    """While another run executes, nothing is recorded; during its own turn each heartbeat records
    the cost so far, so that much is known of a killed worker."""
    bench = Bench()
    await bench.insert()
    bench.engine.turn.clear()
    bench.engine.go_on.clear()
    running = asyncio.create_task(bench.attempt())
    async with asyncio.timeout(DEADLINE_S):
        await bench.engine.running.wait()
        [job] = bench.jobs.rows.values()

    async def has_beaten() -> bool:
        return bench.jobs.rows[job.id].lease_until != job.lease_until

    async def has_cost() -> bool:
        await bench.book.write()
        return bool(bench.ledger.costs)

    await until(has_beaten)
    assert not await has_cost()
    bench.engine.turn.set()
    await until(has_cost)
    assert not running.done()
    so_far_s = await bench.gpu_s()
    assert so_far_s > 0
    bench.engine.go_on.set()
    await running
    assert await bench.gpu_s() >= so_far_s


@pytest.mark.usage
async def test_what_could_not_be_recorded_is_recorded_later() -> None:
    """After an outage the ledger has every attempt's latest figure, and only once."""
    ledger = MemoryUsageLedger(down=True)
    book = UsageRecorder(ledger, every_s=3600)
    first, _ = await MemoryJobStore().insert(new_job())
    other, _ = await MemoryJobStore().insert(new_job())
    book.executed(first, 1.0, 1.0)
    book.executed(other, 2.0, 2.0)
    await book.write()
    book.executed(first, 3.0, 3.0)
    ledger.down = False
    await book.write()
    assert {ref: row.gpu_s for ref, row in ledger.costs.items()} == {first.ref: 3.0, other.ref: 2.0}
    ledger.costs.clear()
    await book.write()
    assert ledger.costs == {}


@pytest.mark.usage
async def test_a_write_that_is_cut_off_has_forgotten_nothing() -> None:
    """A worker that stops while it writes writes once more, including later figures."""
    ledger = _NeverAnswers()
    book = UsageRecorder(ledger, every_s=3600)
    first, _ = await MemoryJobStore().insert(new_job())
    other, _ = await MemoryJobStore().insert(new_job())
    book.executed(first, 1.0, 1.0)
    writing = asyncio.create_task(book.write())
    async with asyncio.timeout(DEADLINE_S):
        await ledger.asked.wait()
    book.executed(other, 2.0, 2.0)
    await stop(writing)
    ledger.answers = True
    await book.write()
    assert {ref: row.gpu_s for ref, row in ledger.costs.items()} == {first.ref: 1.0, other.ref: 2.0}


@dataclass
class _NeverAnswers(MemoryUsageLedger):
    answers: bool = False
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def record(self, costs: Sequence[Cost]) -> None:
        self.asked.set()
        if not self.answers:
            await asyncio.Event().wait()
        await super().record(costs)


@pytest.mark.usage
async def test_costs_are_written_every_so_often() -> None:
    """This needs no request, and goes on through an outage."""
    ledger = MemoryUsageLedger(down=True)
    book = UsageRecorder(ledger, every_s=0.01)
    job, _ = await MemoryJobStore().insert(new_job())
    book.executed(job, 1.0, 1.0)
    writing = asyncio.create_task(book.run())

    async def has_cost() -> bool:
        return bool(ledger.costs)

    await asyncio.sleep(0.05)
    ledger.down = False
    await until(has_cost)
    await stop(writing)


@pytest.mark.usage
async def test_a_ledger_that_is_away_stops_no_job() -> None:
    """A cost that cannot be recorded is logged, and the job succeeds."""
    bench = Bench(MemoryUsageLedger(down=True))
    await bench.insert()
    ended = await bench.attempt()
    await bench.book.write()
    assert ended is not None
    assert ended.status is JobStatus.SUCCEEDED


@pytest.mark.usage
async def test_since_when_is_thirty_days_by_default() -> None:
    """The answer states it."""
    async with open_site() as site, site.client("ann") as client:
        since = datetime.fromisoformat((await client.get(PATH)).json()["since"])
    age = datetime.now(UTC) - since
    assert timedelta(days=30) <= age < timedelta(days=30, hours=1)


@pytest.mark.cancel
async def test_a_cancel_is_obeyed_while_no_cost_can_be_recorded() -> None:
    """An attempt's cost is written beside its lease, and never delays a cancel."""
    bench = Bench(_NeverAnswers())
    bench.engine.go_on.clear()
    await bench.insert()
    running = asyncio.create_task(bench.attempt())
    writing = asyncio.create_task(bench.book.run())
    async with asyncio.timeout(DEADLINE_S):
        await bench.engine.running.wait()
        [job] = bench.jobs.rows.values()
        await bench.jobs.request_cancel(job.id)
        ended = await running
    await stop(writing)
    assert ended is not None
    assert ended.status is JobStatus.CANCELLED
