"""A claimed job: each way in which an attempt can end, and its results."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from PIL import Image

from actors.execution.outcomes import RetryPolicy
from actors.images.encode import engine_input
from actors.images.reader import read
from restoration.engine_port import EnginePreview, EngineProgress
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
from restoration.events import Previewed, Progressed, StateChanged
from restoration.images import UploadLimits
from restoration.jobs import Artifact, JobStatus, OutputFormat
from tests.fakes.execution import DEADLINE_S, NOW, RESULT, RETRY, Bench, open_bench
from tests.fakes.site import photo
from tests.support.polling import until
from tests.support.samples import new_job
from workflows.catalog import Catalog
from workflows.custom import params_of
from workflows.manifest import CUSTOM


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with open_bench() as bench:
        yield bench


class TestSuccess:
    async def test_the_result_is_stored_and_the_job_succeeds(self, bench: Bench) -> None:
        """The object is the engine's picture, named after job and attempt, and the row says so."""
        job = await bench.claimed()
        ended = await bench.run(job)
        assert ended == bench.row(job)
        assert ended.status is JobStatus.SUCCEEDED
        assert ended.output is not None
        assert ended.output.key == f"outputs/{job.id}/1.png"
        assert ended.output.content_type == "image/png"
        assert await bench.blobs.get(ended.output) == RESULT

    async def test_each_stage_is_timed(self, bench: Bench) -> None:
        """The row has each stage's duration; waiting for the engine is not the engine's time."""
        ended = await bench.run(await bench.claimed())
        assert ended is not None
        assert list(ended.timings_s) == ["fetch", "staged", "engine", "encode", "store"]
        assert all(0 <= seconds < DEADLINE_S for seconds in ended.timings_s.values())

    async def test_the_engine_is_free_before_the_picture_is_stored(self, bench: Bench) -> None:
        """The schedule learns when a job is staged, begins and is finished; storing comes after."""
        job = await bench.claimed(photo((5, 7)))
        put = bench.blobs.put

        async def put_last(key: str, data: bytes, content_type: str) -> Artifact:
            bench.occupancy.told.append("stored")
            return await put(key, data, content_type)

        bench.blobs.put = put_last  # type: ignore[method-assign]
        await bench.run(job)
        assert bench.occupancy.told == ["staged 35", "began", "finished", "stored"]

    async def test_events_tell_the_story_in_order(self, bench: Bench) -> None:
        """The order is: running, rising progress, the engine's previews, and the end."""
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

    @pytest.mark.progress
    async def test_the_end_is_told_with_its_row(self, bench: Bench) -> None:
        """Watchers receive exactly what was committed."""
        job = await bench.claimed()
        await bench.run(job)
        assert bench.told_rows == [bench.row(job)]

    async def test_the_engine_gets_the_photo_and_the_rendered_workflow(self, bench: Bench) -> None:
        """The engine gets the upload's pixels, the row's parameters and the output node to read."""
        image = photo((5, 7))
        await bench.run(await bench.claimed(image, params={"strength": 0.5}))
        run = bench.engine.runs[0]
        for_engine, _ = engine_input(read(image, UploadLimits()), on_white=False)
        assert (run.image, run.image_suffix, run.output_node) == (for_engine, ".pnm", "result")
        inputs = {node: part["inputs"] for node, part in bench.engine.prompts[run.id].items()}
        assert inputs["photo"]["image"] == f"{run.id}/input.pnm"
        assert inputs["result"]["filename_prefix"] == f"{run.id}/output"
        assert inputs["blended"]["blend_factor"] == 0.5

    @pytest.mark.images
    async def test_a_graph_that_moves_pixels_gets_them_on_white(self, bench: Bench) -> None:
        """The photo's transparency is not applied to a result whose pixels moved."""
        clear = io.BytesIO()
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(clear, "PNG")
        stored = await bench.blobs.put("inputs/1.png", clear.getvalue(), "image/png")
        flip = {"class_type": "ImageFlip", "inputs": {"image": ["1", 0], "flip_method": "x"}}
        graph = {
            "1": {"class_type": "LoadImage", "inputs": {"image": "image"}},
            "2": flip,
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": ""}},
        }
        await bench.jobs.insert(new_job(input=stored, workflow=CUSTOM, params=params_of(graph)))
        job = await bench.jobs.claim("worker-1", 60, [CUSTOM])
        assert job is not None
        await bench.run(job)
        with Image.open(io.BytesIO(bench.engine.runs[0].image)) as image:
            assert image.convert("RGBA").getcolors() == [(16, (255, 255, 255, 255))]

    async def test_deep_greys_reach_the_engine_in_8_bits(self, bench: Bench) -> None:
        """ComfyUI would make a 16-bit scan white, so it gets one that it reads correctly."""
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
        """One execution handles several jobs at once, each with its own result."""
        bench.engine.go_on.clear()
        jobs = [await bench.claimed() for _ in range(3)]
        tasks = [asyncio.create_task(bench.run(job)) for job in jobs]
        await until(lambda: len(bench.engine.runs) == 3)
        bench.engine.go_on.set()
        await asyncio.gather(*tasks)
        assert {bench.row(job).status for job in jobs} == {JobStatus.SUCCEEDED}
        assert len(bench.outputs()) == 3


class TestFailure:
    @pytest.mark.retry
    @pytest.mark.parametrize(
        ("error", "held_against_it"),
        [
            (EngineCrashed, 1),
            (EngineStalled, 1),
            (EngineOutOfMemory, 1),
            (EngineUnavailable, 0),  # nothing ran
            (DependencyUnavailable, 0),  # an outage is not the fault of the job
        ],
    )
    async def test_what_may_pass_is_tried_again(
        self, bench: Bench, error: type[RestorationError], held_against_it: int
    ) -> None:
        """The job waits with a delay; only some errors count against it."""
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
        """Delays double with each failure up to the longest one."""
        policy = RetryPolicy(first_s=1, longest_s=30)
        for failures, ceiling in enumerate([1, 2, 4, 8, 16, 30, 30]):
            assert ceiling / 2 <= policy.delay_s(failures) <= ceiling

    async def test_s3_away_is_tried_again(self, bench: Bench) -> None:
        """A failed fetch of the input is not charged to the job, however often."""
        job = await bench.claimed()
        bench.blobs.down = True
        ended = await bench.run(job)
        assert ended is not None
        assert (ended.status, ended.failed_attempts) == (JobStatus.QUEUED, 0)
        assert not bench.engine.runs

    async def test_it_is_not_tried_for_ever(self, bench: Bench) -> None:
        """The last of `max_attempts` fails the job with the error's code and message."""
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
        """The engine never sees bytes other than those uploaded."""
        job = await bench.claimed()
        bench.blobs.objects[job.input.key] = photo((9, 9))
        ended = await bench.run(job)
        assert ended is not None
        assert ended.failure is not None
        assert ended.failure.code == "artifact_corrupt"
        assert not bench.engine.runs

    async def test_a_defect_of_ours_ends_the_attempt_only(self, bench: Bench) -> None:
        """The job is handed back as internal_error, which reveals nothing; the next one runs."""
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
        """Past the workflow's limit the engine is stopped, and the job fails as engine_timeout."""
        workflow = bench.catalog.find("restore")
        manifest = workflow.manifest.model_copy(update={"run_limit_s": 1.0})
        bench.catalog = Catalog({"restore": replace(workflow, manifest=manifest)})
        bench.engine.go_on.clear()
        job = await bench.claimed()
        await bench.run(job)
        failure = bench.row(job).failure
        assert failure is not None
        assert failure.code == "engine_timeout"
        assert bench.engine.stopped == [run.id for run in bench.engine.runs]
        assert bench.occupancy.told == ["staged 64", "began"]

    @pytest.mark.versions
    async def test_a_job_runs_the_version_it_was_submitted_with(self, bench: Bench) -> None:
        """The newest version may have come since, with a graph that the job did not ask for."""
        older = bench.catalog.find("restore")
        nodes = {name: dict(node) for name, node in older.graph.items()}
        manifest = older.manifest.model_copy(update={"version": "2"})
        newest = replace(
            older, manifest=manifest, graph=nodes | {"extra": {"class_type": "New", "inputs": {}}}
        )
        bench.catalog = Catalog({"restore": newest}, {("restore", "1"): older})
        for version, has_extra in (("1", False), ("2", True)):
            ended = await bench.run(await bench.claimed(workflow_version=version))
            assert ended is not None
            assert ended.status is JobStatus.SUCCEEDED
            prompt = bench.engine.runs[-1].render("photo.png", "prefix")
            assert ("extra" in prompt) is has_extra

    @pytest.mark.deadlines
    async def test_the_time_limit_is_for_execution(self, bench: Bench) -> None:
        """A job staged behind another's long one loses none of its own time."""
        bench.engine.turn.clear()
        bench.engine.go_on.clear()
        job = await bench.claimed(run_limit_s=0.5)
        task = await bench.start(job)
        await until(lambda: bench.jobs.beats >= 60)  # each takes a hundredth of a second or more
        assert not task.done()
        bench.engine.turn.set()
        await task
        failure = bench.row(job).failure
        assert failure is not None
        assert failure.code == "engine_timeout"
