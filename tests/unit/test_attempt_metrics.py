"""Points 7 and 9: what an attempt adds to the metrics and to the ledger."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from actors.observability.observers import MetricsObserver
from actors.observability.timings import ENGINE, Stopwatch
from restoration.jobs import AttemptOutcome, AttemptRecord, Job, JobStatus
from restoration.observability.metrics import ATTEMPTS, GPU_BUSY, STAGES
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.meter import MemoryMeter
from tests.support.samples import new_job

NOW = datetime(2030, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Stopwatch:
    """Run an attempt: 1 s to fetch, 2 s until its turn, 3 + 4 s in nodes, 5 s to encode."""
    watch = Stopwatch(clock)
    for stage, took_s in (("fetch", 1), ("staged", 2)):
        watch.enter(stage)
        clock.now_s += took_s
    watch.enter(ENGINE)
    for node, took_s in (("UpscaleModelLoader", 3), ("ImageUpscaleWithModel", 4)):
        watch.enter_node(node)
        clock.now_s += took_s
    watch.enter("encode")
    clock.now_s += 5
    watch.stop()
    return watch


@pytest.fixture
async def job() -> Job:
    jobs = MemoryJobStore(clock=lambda: NOW)
    await jobs.insert(new_job())
    claimed = await jobs.claim("worker", 60, ["restore"])
    assert claimed is not None
    return replace(claimed, available_at=NOW - timedelta(seconds=9))


def _ended(job: Job, outcome: AttemptOutcome, code: str | None = None) -> Job:
    record = AttemptRecord(1, "worker", NOW, NOW, outcome, code)
    return replace(job, status=JobStatus.QUEUED, attempts=(record,))


@pytest.mark.metrics
def test_each_stage_is_one_observation(watch: Stopwatch, job: Job) -> None:
    """Queue time starts when the attempt could have begun; engine time is split into loaders and
    other nodes."""
    meter = MemoryMeter()
    MetricsObserver(meter).ended(job, watch, _ended(job, AttemptOutcome.SUCCEEDED))
    stages = {"queue": 9, "fetch": 1, "staged": 2, "load": 3, "execute": 4, "encode": 5}
    for stage, took_s in stages.items():
        assert meter.observed(STAGES, stage=stage, workflow="restore") == pytest.approx([took_s])
    assert len(meter.observed(STAGES)) == len(stages)


@pytest.mark.metrics
@pytest.mark.parametrize(
    ("outcome", "code", "told"),
    [
        (AttemptOutcome.SUCCEEDED, None, ("succeeded", "none")),
        (AttemptOutcome.FAILED, "engine_crashed", ("failed", "engine_crashed")),
        (AttemptOutcome.HANDED_BACK, None, ("handed_back", "none")),
    ],
)
def test_an_attempt_counts_by_how_it_ended(
    job: Job, outcome: AttemptOutcome, code: str | None, told: tuple[str, str]
) -> None:
    """An attempt counts under the outcome and the code in the job's history."""
    meter = MemoryMeter()
    MetricsObserver(meter).ended(job, Stopwatch(), _ended(job, outcome, code))
    assert meter.counted(ATTEMPTS, outcome=told[0], code=told[1]) == 1


@pytest.mark.metrics
def test_an_attempt_that_was_taken_away_is_lost(job: Job) -> None:
    """An attempt counts as lost if its worker did not end it."""
    meter = MemoryMeter()
    MetricsObserver(meter).ended(job, Stopwatch(), None)
    assert meter.counted(ATTEMPTS, outcome="lost", code="none") == 1


@pytest.mark.usage
def test_gpu_seconds_are_those_of_the_engine(watch: Stopwatch, clock: Clock) -> None:
    """Waiting for the turn, fetching and encoding do not count."""
    assert watch.gpu_s == pytest.approx(7)
    clock.now_s += 100
    assert watch.gpu_s == pytest.approx(7)


@pytest.mark.usage
def test_gpu_seconds_grow_while_the_engine_executes(clock: Clock, job: Job) -> None:
    """Each reading returns only the seconds since the last, so the sum is always right."""
    watch, meter = Stopwatch(clock), MemoryMeter()
    measured = MetricsObserver(meter)
    watch.enter(ENGINE)
    for took_s in (1.0, 2.5):
        clock.now_s += took_s
        measured.executed(job, watch.gpu_s, watch.take_gpu_s())
    watch.stop()
    assert watch.take_gpu_s() == 0
    assert meter.counted(GPU_BUSY, workflow="restore") == pytest.approx(3.5)
