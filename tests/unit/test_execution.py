"""What becomes of a claimed job: each way an attempt can go, and what is left behind."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from PIL import Image

from actors.execution import Execution, Lease, RetryPolicy, Visit
from restoration.errors import (
    DependencyUnavailable,
    EngineCrashed,
    EngineFailed,
    EngineOutOfMemory,
    EngineRejected,
    EngineStalled,
    EngineUnavailable,
    RestorationError,
)
from restoration.events import JobEvent, Previewed, Progressed, StateChanged
from restoration.jobs import Artifact, AttemptRef, Failure, Job, JobStatus, OutputFormat
from restoration.ports import EnginePreview, EngineProgress
from tests.fakes.engine import MemoryEngine, encode_here
from tests.fakes.site import photo
from tests.fakes.stores import MemoryBlobStore, MemoryJobStore
from tests.samples import new_job
from workflows.catalog import Catalog, load_catalog

DEADLINE_S = 20
LEASE = Lease(heartbeat_s=0.01, lease_s=60)
RETRY = RetryPolicy(first_s=0.01, longest_s=0.02, record_s=DEADLINE_S)
NOW = datetime(2030, 1, 1, tzinfo=UTC)
RESULT = photo((32, 32))


@dataclass
class Jobs(MemoryJobStore):
    """Counts what it is asked, also while it is down."""

    beats: int = 0
    writes: int = 0
    releases: int = 0

    async def heartbeat(self, ref: AttemptRef, lease_s: float) -> JobStatus:
        self.beats += 1
        return await super().heartbeat(ref, lease_s)

    async def succeed(self, ref: AttemptRef, output: Artifact, timings_s: Any) -> Job:
        self.writes += 1
        return await super().succeed(ref, output, timings_s)

    async def release(
        self,
        ref: AttemptRef,
        failure: Failure | None,
        delay_s: float = 0,
        *,
        charged: bool = True,
    ) -> Job:
        self.releases += 1
        return await super().release(ref, failure, delay_s, charged=charged)


@dataclass
class Visits(Visit):
    """What a pipeline is told, in order."""

    told: list[str] = field(default_factory=list)

    def staged(self, pixels: int) -> None:
        self.told.append(f"staged {pixels}")

    def began(self) -> None:
        self.told.append("began")

    def left(self) -> None:
        self.told.append("left")


@dataclass
class Bench:
    """An execution on fakes, and the events it published."""

    catalog: Catalog = field(default_factory=load_catalog)
    retry: RetryPolicy = RETRY
    jobs: Jobs = field(default_factory=lambda: Jobs(clock=lambda: NOW))
    blobs: MemoryBlobStore = field(default_factory=MemoryBlobStore)
    engine: MemoryEngine = field(default_factory=lambda: MemoryEngine(RESULT))
    events: list[tuple[UUID, JobEvent]] = field(default_factory=list)
    visit: Visits = field(default_factory=Visits)

    async def claimed(self, image: bytes | None = None, **changes: Any) -> Job:
        stored = await self.blobs.put("inputs/1.png", image or photo(), "image/png")
        params = self.catalog.find("restore").resolve(changes.pop("params", {}))
        await self.jobs.insert(new_job(input=stored, params=params, **changes))
        job = await self.jobs.claim("worker-1", LEASE.lease_s, ["restore"])
        assert job is not None
        return job

    async def run(self, job: Job) -> Job | None:
        def publish(job_id: UUID, event: JobEvent) -> None:
            self.events.append((job_id, event))

        execution = Execution(
            self.catalog,
            self.jobs,
            self.blobs,
            self.engine,
            encode_here,
            publish,
            LEASE,
            self.retry,
        )
        async with asyncio.timeout(DEADLINE_S):
            return await execution.run(job, self.visit)

    async def start(self, job: Job) -> asyncio.Task[Job | None]:
        """Run the job up to the engine, which holds it."""
        self.engine.go_on.clear()
        task = asyncio.create_task(self.run(job))
        async with asyncio.timeout(DEADLINE_S):
            await self.engine.running.wait()
        return task

    def row(self, job: Job) -> Job:
        return self.jobs.rows[job.id]

    def states(self) -> list[JobStatus]:
        return [event.status for _, event in self.events if isinstance(event, StateChanged)]

    def outputs(self) -> list[str]:
        return [key for key in self.blobs.objects if key.startswith("outputs/")]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Whatever a test does, an attempt leaves no task behind: no heartbeat beats on."""
    before = asyncio.all_tasks()
    yield Bench()
    assert asyncio.all_tasks() - before <= {asyncio.current_task()}


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():  # noqa: ASYNC110 - fakes and tasks tell nobody when they change
            await asyncio.sleep(0.002)


class TestSuccess:
    async def test_the_result_is_stored_and_the_job_succeeds(self, bench: Bench) -> None:
        """The object is the engine's picture, named after job and attempt; the row says so."""
        job = await bench.claimed()
        ended = await bench.run(job)
        assert ended == bench.row(job)
        assert ended.status is JobStatus.SUCCEEDED
        assert ended.output is not None
        assert ended.output.key == f"outputs/{job.id}/1.png"
        assert ended.output.content_type == "image/png"
        assert await bench.blobs.get(ended.output) == RESULT

    async def test_each_stage_is_timed(self, bench: Bench) -> None:
        """The row says how long each took; waiting for the engine is not the engine's time."""
        ended = await bench.run(await bench.claimed())
        assert ended is not None
        assert list(ended.timings_s) == ["fetch", "staged", "engine", "encode", "store"]
        assert all(0 <= seconds < DEADLINE_S for seconds in ended.timings_s.values())

    async def test_the_engine_is_free_before_the_picture_is_stored(self, bench: Bench) -> None:
        """Who lets jobs in hears when one is staged, begins and has left; storing comes after."""
        job = await bench.claimed(photo((5, 7)))
        put = bench.blobs.put

        async def put_last(key: str, data: bytes, content_type: str) -> Artifact:
            bench.visit.told.append("stored")
            return await put(key, data, content_type)

        bench.blobs.put = put_last  # type: ignore[method-assign]
        await bench.run(job)
        assert bench.visit.told == ["staged 35", "began", "left", "stored"]

    async def test_events_tell_the_story_in_order(self, bench: Bench) -> None:
        """Running, progress that only rises, the engine's previews, and the end as the last."""
        bench.engine.events = [
            EngineProgress(0.0, "LoadImage"),
            EnginePreview(b"small", "image/jpeg"),
            EngineProgress(1.0, "SaveImage"),
        ]
        job = await bench.claimed()
        await bench.run(job)
        assert bench.events == [
            (job.id, event)
            for event in (
                StateChanged(JobStatus.RUNNING, 1),
                Progressed(0, "fetching", 1),
                Progressed(0.05, "LoadImage", 1),
                Previewed.from_bytes(b"small", "image/jpeg", 1),
                Progressed(0.9, "SaveImage", 1),
                Progressed(0.9, "storing", 1),
                StateChanged(JobStatus.SUCCEEDED, 1),
            )
        ]

    async def test_the_engine_gets_the_upload_and_the_rendered_workflow(self, bench: Bench) -> None:
        """The picture as it was stored, the parameters of the row, the output node to read."""
        image = photo((5, 7))
        await bench.run(await bench.claimed(image, params={"strength": 0.5}))
        run = bench.engine.runs[0]
        assert (run.image, run.image_suffix, run.output_node) == (image, ".png", "result")
        inputs = {node: part["inputs"] for node, part in bench.engine.prompts[run.id].items()}
        assert inputs["photo"]["image"] == f"{run.id}/input.png"
        assert inputs["result"]["filename_prefix"] == f"{run.id}/output"
        assert inputs["blended"]["blend_factor"] == 0.5

    async def test_deep_greys_reach_the_engine_in_8_bits(self, bench: Bench) -> None:
        """ComfyUI would make a 16-bit scan white, so it gets one that it reads right."""
        deep = io.BytesIO()
        Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(deep, "PNG")
        await bench.run(await bench.claimed(deep.getvalue()))
        with Image.open(io.BytesIO(bench.engine.runs[0].image)) as image:
            assert (image.mode, image.getpixel((0, 0))) == ("L", 0x80)

    async def test_the_result_is_written_as_was_asked(self, bench: Bench) -> None:
        """Format and quality are those of the row; key and content type follow the format."""
        sizes = []
        for quality in (10, 95):
            job = await bench.claimed(params={"quality": quality}, output_format=OutputFormat.JPEG)
            ended = await bench.run(job)
            assert ended is not None
            output = ended.result()
            assert (output.key, output.content_type) == (f"outputs/{job.id}/1.jpg", "image/jpeg")
            assert bench.blobs.objects[output.key].startswith(b"\xff\xd8\xff")
            sizes.append(output.size_bytes)
        assert sizes[0] < sizes[1]

    async def test_no_run_id_is_used_twice(self, bench: Bench) -> None:
        """Each attempt is a run of its own, since ComfyUI mixes up two that share an id."""
        for _ in range(3):
            await bench.run(await bench.claimed())
        assert len({run.id for run in bench.engine.runs}) == 3

    async def test_attempts_may_overlap(self, bench: Bench) -> None:
        """One execution sees several jobs through at once, each to its own result."""
        bench.engine.go_on.clear()
        jobs = [await bench.claimed() for _ in range(3)]
        tasks = [asyncio.create_task(bench.run(job)) for job in jobs]
        await _until(lambda: len(bench.engine.runs) == 3)
        bench.engine.go_on.set()
        await asyncio.gather(*tasks)
        assert {bench.row(job).status for job in jobs} == {JobStatus.SUCCEEDED}
        assert len(bench.outputs()) == 3


class TestFailure:
    @pytest.mark.parametrize(
        ("error", "held_against_it"),
        [
            (EngineCrashed, 1),
            (EngineStalled, 1),
            (EngineOutOfMemory, 1),
            (EngineUnavailable, 0),  # nothing ran
            (DependencyUnavailable, 0),  # an outage says nothing about the job
        ],
    )
    async def test_03_what_may_pass_is_tried_again(
        self, bench: Bench, error: type[RestorationError], held_against_it: int
    ) -> None:
        """The job is queued with a delay; an attempt that says something of it is counted."""
        bench.engine.error = error("it died")
        job = await bench.claimed()
        ended = await bench.run(job)
        assert ended is not None
        assert (ended.status, ended.failed_attempts) == (JobStatus.QUEUED, held_against_it)
        delay = ended.available_at - NOW
        assert timedelta(seconds=RETRY.first_s / 2) <= delay <= timedelta(seconds=RETRY.first_s)
        assert bench.events[-1] == (job.id, StateChanged(JobStatus.QUEUED, 1))
        assert not bench.outputs()

    def test_delays_grow_to_a_limit(self) -> None:
        """They double with each failure, and never exceed the longest one."""
        policy = RetryPolicy(first_s=1, longest_s=30)
        for failures, ceiling in enumerate([1, 2, 4, 8, 16, 30, 30]):
            assert ceiling / 2 <= policy.delay_s(failures) <= ceiling

    async def test_s3_away_is_tried_again(self, bench: Bench) -> None:
        """An input that cannot be fetched now is not held against the job, however often."""
        job = await bench.claimed()
        bench.blobs.down = True
        ended = await bench.run(job)
        assert ended is not None
        assert (ended.status, ended.failed_attempts) == (JobStatus.QUEUED, 0)
        assert not bench.engine.runs

    async def test_it_is_not_tried_for_ever(self, bench: Bench) -> None:
        """The last of `max_attempts` fails the job, with the error's code and message."""
        bench.engine.error = EngineCrashed("it died")
        job = await bench.claimed(max_attempts=1)
        await bench.run(job)
        row = bench.row(job)
        assert row.status is JobStatus.FAILED
        assert row.failure is not None
        assert (row.failure.code, row.failure.message) == ("engine_crashed", "it died")
        assert bench.states() == [JobStatus.RUNNING, JobStatus.FAILED]

    @pytest.mark.parametrize("error", [EngineFailed, EngineRejected])
    async def test_what_will_not_pass_fails_the_job(
        self, bench: Bench, error: type[RestorationError]
    ) -> None:
        """Another attempt would end the same way, so there is none."""
        bench.engine.error = error("a node raised")
        job = await bench.claimed()
        await bench.run(job)
        row = bench.row(job)
        assert row.status is JobStatus.FAILED
        assert row.failure is not None
        assert (row.failure.code, row.failure.message) == (error.code, "a node raised")

    async def test_a_corrupt_input_fails_the_job(self, bench: Bench) -> None:
        """The engine never sees bytes other than those that were uploaded."""
        job = await bench.claimed()
        bench.blobs.objects[job.input.key] = photo((9, 9))
        ended = await bench.run(job)
        assert ended is not None
        assert ended.failure is not None
        assert ended.failure.code == "artifact_corrupt"
        assert not bench.engine.runs

    async def test_a_defect_of_ours_ends_the_attempt_only(self, bench: Bench) -> None:
        """The job is handed back as internal_error, which shows nothing; the next one runs."""
        bench.engine.error = KeyError("hunter2")
        job = await bench.claimed(max_attempts=2)
        ended = await bench.run(job)
        assert ended is not None
        assert (ended.status, ended.failed_attempts) == (JobStatus.QUEUED, 1)
        bench.jobs.clock = lambda: NOW + timedelta(seconds=1)
        again = await bench.jobs.claim("worker-2", 60, ["restore"])
        assert again is not None
        ended = await bench.run(again)
        assert ended is not None
        assert ended.failure is not None
        assert ended.failure.code == "internal_error"
        assert "hunter2" not in ended.failure.message
        bench.engine.error = None
        ended = await bench.run(await bench.claimed())
        assert ended is not None
        assert ended.status is JobStatus.SUCCEEDED

    async def test_an_attempt_has_a_time_limit(self, bench: Bench) -> None:
        """Over the workflow's limit the engine is stopped, and the job fails as engine_timeout."""
        workflow = bench.catalog.find("restore")
        manifest = workflow.manifest.model_copy(update={"run_limit_s": 0.05})
        bench.catalog = Catalog({"restore": replace(workflow, manifest=manifest)})
        bench.engine.go_on.clear()
        job = await bench.claimed()
        await bench.run(job)
        failure = bench.row(job).failure
        assert failure is not None
        assert failure.code == "engine_timeout"
        assert bench.engine.stopped == [run.id for run in bench.engine.runs]
        assert bench.visit.told == ["staged 64", "began"]

    async def test_06_a_job_runs_the_version_it_was_submitted_with(self, bench: Bench) -> None:
        """The newest may have come since: another graph, which nobody asked for."""
        older = bench.catalog.find("restore")
        nodes = {name: dict(node) for name, node in older.graph.items()}
        manifest = older.manifest.model_copy(update={"version": "2"})
        newest = replace(older, manifest=manifest, graph=nodes | {"extra": {"class_type": "New"}})
        bench.catalog = Catalog({"restore": newest}, {("restore", "1"): older})
        for version, has_extra in (("1", False), ("2", True)):
            ended = await bench.run(await bench.claimed(workflow_version=version))
            assert ended is not None
            assert ended.status is JobStatus.SUCCEEDED
            prompt = bench.engine.runs[-1].render("photo.png", "prefix")
            assert ("extra" in prompt) is has_extra

    async def test_06_the_time_limit_is_for_execution(self, bench: Bench) -> None:
        """A job that is staged behind another's long one loses nothing of its own time."""
        bench.engine.turn.clear()
        bench.engine.go_on.clear()
        job = await bench.claimed(run_limit_s=0.05)
        task = await bench.start(job)
        await _until(lambda: bench.jobs.beats >= 20)  # a hundredth of a second each, or more
        assert not task.done()
        bench.engine.turn.set()
        await task
        failure = bench.row(job).failure
        assert failure is not None
        assert failure.code == "engine_timeout"


class TestCancel:
    async def test_05_a_running_job_is_interrupted(self, bench: Bench) -> None:
        """A heartbeat brings the news, the engine is interrupted, the job ends as cancelled."""
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

    async def test_05_a_cancel_before_the_engine_has_the_run_is_not_lost(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is asked again with each heartbeat, until there is something to interrupt."""
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
        await _until(lambda: JobStatus.CANCELLING in bench.states())
        fetched.set()
        ended = await task
        assert ended is not None
        assert ended.status is JobStatus.CANCELLED

    async def test_a_job_that_finishes_first_stays_finished(self, bench: Bench) -> None:
        """A cancel that comes too late for the engine changes nothing."""
        job = await bench.claimed()
        await bench.jobs.request_cancel(job.id)
        ended = await bench.run(job)
        assert ended is not None
        assert ended.status is JobStatus.SUCCEEDED


class TestLease:
    async def test_it_is_kept_while_the_engine_works(self, bench: Bench) -> None:
        """Heartbeats extend it for as long as the attempt lasts, and end with it."""
        later = NOW + timedelta(seconds=30)
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.clock = lambda: later
        await _until(lambda: bench.row(job).lease_until == later + timedelta(seconds=60))
        bench.engine.go_on.set()
        await task

    async def test_02_who_loses_it_stops_at_once(self, bench: Bench) -> None:
        """The engine's run is stopped; neither an object, nor the row, nor an end is written."""
        job = await bench.claimed()
        task = await bench.start(job)
        anothers = replace(bench.row(job), attempt=2, worker="worker-2")
        bench.jobs.rows[job.id] = anothers
        assert await task is None
        assert bench.engine.stopped == [run.id for run in bench.engine.runs]
        assert bench.row(job) == anothers
        assert bench.states() == [JobStatus.RUNNING]
        assert not bench.outputs()

    async def test_02_who_lost_it_unnoticed_changes_nothing(self, bench: Bench) -> None:
        """A result that comes after another attempt has begun is not the job's."""
        job = await bench.claimed()
        anothers = replace(bench.row(job), attempt=2, worker="worker-2")
        bench.jobs.rows[job.id] = anothers
        assert await bench.run(job) is None
        assert bench.row(job) == anothers
        assert bench.states() == [JobStatus.RUNNING]

    async def test_missed_heartbeats_stop_nothing(self, bench: Bench) -> None:
        """While Postgres is away the attempt goes on, and succeeds when it is back in time."""
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.down = True
        missed_from = bench.jobs.beats
        await _until(lambda: bench.jobs.beats >= missed_from + 3)
        bench.jobs.down = False
        bench.engine.go_on.set()
        ended = await task
        assert ended is not None
        assert ended.status is JobStatus.SUCCEEDED


class TestRecording:
    async def test_an_outcome_waits_for_postgres(self, bench: Bench) -> None:
        """A result is recorded once Postgres is back; the engine's work is not thrown away."""
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.down = True
        bench.engine.go_on.set()
        await _until(lambda: bench.jobs.writes >= 3)
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
        """Cancelling the worker stops its engine, and queues the job at once for another."""
        job = await bench.claimed()
        task = await bench.start(job)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        row = bench.row(job)
        assert (row.status, row.failed_attempts, row.worker) == (JobStatus.QUEUED, 0, None)
        assert await bench.jobs.waiting(1) == [AttemptRef(job.id, 2)]
        assert bench.engine.stopped == [run.id for run in bench.engine.runs]

    async def test_the_lease_is_kept_while_the_engine_stops(self, bench: Bench) -> None:
        """An engine may take longer to stop than the lease lasts: the worker is not dead yet."""
        bench.engine.may_stop.clear()
        job = await bench.claimed()
        task = await bench.start(job)
        task.cancel()
        await _until(lambda: task.cancelling() > 0)
        seen = bench.jobs.beats
        await _until(lambda: bench.jobs.beats >= seen + 3)
        bench.engine.may_stop.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.row(job).status is JobStatus.QUEUED

    async def test_an_outcome_that_is_being_recorded_is_recorded(self, bench: Bench) -> None:
        """A worker that is told to go with a result in its hands delivers it first."""
        job = await bench.claimed()
        task = await bench.start(job)
        bench.jobs.down = True
        bench.engine.go_on.set()
        await _until(lambda: bench.jobs.writes >= 1)
        task.cancel()
        seen = bench.jobs.writes
        await _until(lambda: bench.jobs.writes > seen + 1)
        assert bench.jobs.releases == 0  # a result is not to race with its own job's return
        bench.jobs.down = False
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.row(job).status is JobStatus.SUCCEEDED

    async def test_nothing_but_the_cancellation_comes_out(self, bench: Bench) -> None:
        """Neither a lost lease nor an absent Postgres takes the cancellation's place."""
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
