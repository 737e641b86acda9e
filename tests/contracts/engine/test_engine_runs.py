"""Results of runs: picture, progress and errors."""

from __future__ import annotations

import asyncio
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from comfy_pool.protocol.client import ComfyClient
from comfy_pool.protocol.responses import HistoryEntry
from restoration.engine_port import (
    Engine,
    EngineBegan,
    EngineEvent,
    EngineProgress,
    EngineRun,
    EngineStaged,
    Pixels,
    Prompt,
)
from restoration.errors import EngineFailed, EngineInterrupted, EngineOutOfMemory, EngineRejected
from tests.contracts.engine.bench import Bench, until_running
from tests.fakes import graphs
from tests.fakes.graphs import RunEventLog, ignore


async def test_the_picture_comes_back(bench: Bench) -> None:
    """A run returns the picture that reached its output node."""
    engine: Engine = bench.engine
    image = graphs.picture("orange")
    result = await engine.run(graphs.through(graphs.steps(), image=image), ignore)
    assert graphs.pixels(result) == graphs.pixels(image)


async def test_progress_rises_from_node_to_node_to_one(bench: Bench) -> None:
    """The fraction never falls, advances within a node, ends at 1 and names the node's class."""
    heard = RunEventLog()
    await bench.engine.run(graphs.through(graphs.steps(5)), heard)
    assert heard.fractions == sorted(heard.fractions)
    assert heard.fractions[-1] == 1.0
    within = {p.fraction for p in heard.progress if p.node_class == "TestSteps"}
    assert len(within) >= 5
    assert {p.node_class for p in heard.progress} >= {"LoadImage", "TestSteps", "SaveImage"}


@pytest.mark.overlap
async def test_a_run_tells_when_its_turn_has_come(bench: Bench) -> None:
    """EngineStaged and EngineBegan come once, before all other events; for a queued run, the latter
    not before the last step of the run ahead."""
    first = graphs.through(graphs.steps(40, 0.05))
    told: list[tuple[str, EngineEvent]] = []
    ahead = asyncio.create_task(bench.engine.run(first, lambda e: told.append(("first", e))))
    await until_running(bench, first)
    await bench.engine.run(graphs.through(), lambda e: told.append(("second", e)))
    await ahead
    steps = [
        place
        for place, (who, event) in enumerate(told)
        if who == "first" and isinstance(event, EngineProgress) and event.node_class == "TestSteps"
    ]
    assert told.index(("second", EngineBegan())) > max(steps)
    for who in ("first", "second"):
        events = [event for each, event in told if each == who]
        marks = [event for event in events if isinstance(event, EngineStaged | EngineBegan)]
        assert marks == events[:2] == [EngineStaged(), EngineBegan()]


async def test_previews_arrive(bench: Bench) -> None:
    """Previews reach the run that they show, and no other."""
    with_previews, without = RunEventLog(), RunEventLog()
    await asyncio.gather(
        bench.engine.run(graphs.through(graphs.steps(3, preview=True)), with_previews),
        bench.engine.run(graphs.through(graphs.steps(3)), without),
    )
    assert len(with_previews.previews) == 3
    assert all(p.content_type == "image/jpeg" for p in with_previews.previews)
    assert all(p.data.startswith(b"\xff\xd8") for p in with_previews.previews)
    assert without.previews == []


async def test_each_run_has_folders_of_its_own(bench: Bench) -> None:
    """Rules 5, 10, 11, 12: the names given to the graph are in a folder named after the run."""
    names: list[str] = []
    run = graphs.through()

    def render(image_name: str, output_prefix: str) -> Prompt:
        names.extend((image_name, output_prefix))
        return run.render(image_name, output_prefix)

    await bench.engine.run(
        EngineRun(run.id, run.image, run.image_suffix, render, run.output_node), ignore
    )
    assert all(str(run.id) in name.split("/")[:-1] for name in names)


async def test_a_cached_prompt_still_gives_its_own_picture(bench: Bench) -> None:
    """Rules 3 and 5: a result that ComfyUI has cached from an earlier run is returned to the next
    one."""
    first = await bench.engine.run(graphs.drawn(0x123456), ignore)
    again = await bench.engine.run(graphs.drawn(0x123456), ignore)
    assert graphs.pixels(first) == graphs.pixels(again) == ((12, 8), b"\x12\x34\x56" * 96)


async def test_an_output_outside_the_runs_folder_is_refused(bench: Bench) -> None:
    """Rule 5: a graph that ignores its prefix could otherwise return another run's file."""
    with pytest.raises(EngineFailed, match="outside of the run's folder"):
        await bench.attached(graphs.drawn(1, prefix="elsewhere/output"))
    await asyncio.to_thread(shutil.rmtree, bench.base_dir / "output" / "elsewhere")


async def test_a_batch_is_no_picture(bench: Bench) -> None:
    """Rule 13: an output of several frames fails instead of losing all but one."""
    with pytest.raises(EngineFailed, match="expected one image, got 2"):
        await bench.engine.run(graphs.drawn(2, batch_size=2), ignore)
    with pytest.raises(EngineFailed, match="saved 2 images"):
        await bench.attached(graphs.drawn(2, batch_size=2))


@pytest.mark.pixels
async def test_pixels_that_are_handed_over_are_those_of_the_png(bench: Bench) -> None:
    """Our output node rounds like SaveImage, also for values beyond black and white."""
    noise = np.random.default_rng(7).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    # Bicubic scaling overshoots, and gives values between whole numbers.
    scale = graphs.node("ImageScaleBy", upscale_method="bicubic", scale_by=1.7)
    run = graphs.through(scale, image=file.getvalue())
    handed_over = await bench.engine.run(run, ignore)
    saved = await bench.attached(graphs.through(scale, image=file.getvalue()))
    assert isinstance(handed_over, Pixels)
    assert isinstance(saved, bytes)
    assert saved.startswith(b"\x89PNG")
    assert graphs.pixels(handed_over) == graphs.pixels(saved)


@pytest.mark.pixels
async def test_events_that_tell_all_spare_the_look_into_history(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history is not read after a success with pixels, but after a failure, or on a plain
    engine."""
    asked: list[str] = []
    history = ComfyClient.history

    async def counted(client: ComfyClient, prompt_id: str) -> HistoryEntry | None:
        asked.append(prompt_id)
        return await history(client, prompt_id)

    monkeypatch.setattr(ComfyClient, "history", counted)
    run = graphs.through(image=graphs.picture("teal"))
    assert graphs.pixels(await bench.engine.run(run, ignore)) == graphs.pixels(run.image)
    assert not asked
    with pytest.raises(EngineFailed, match="no such luck"):
        await bench.engine.run(failing := graphs.through(graphs.fail("no such luck")), ignore)
    await bench.attached(plain := graphs.through())
    assert asked == [str(failing.id), str(plain.id)]


@pytest.mark.pixels
async def test_a_run_that_fails_leaves_no_pixels(bench: Bench) -> None:
    """Pixels of an interrupted run are deleted, and those of one cancelled after its result
    came."""
    slow = graphs.steps(1000, 0.05)
    stopped = graphs.through(slow)
    running = asyncio.create_task(bench.engine.run(stopped, ignore))
    await until_running(bench, stopped)
    await bench.engine.interrupt(stopped.id)
    with pytest.raises(EngineInterrupted):
        await running

    def cancel_at_the_end(event: EngineEvent) -> None:
        if isinstance(event, EngineProgress) and event.fraction == 1.0:
            ending.cancel()

    ending = asyncio.create_task(bench.engine.run(graphs.through(), cancel_at_the_end))
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert not list(bench.pixels_dir.iterdir())


async def test_runs_at_once_do_not_mix(bench: Bench) -> None:
    """Rule 11: runs that are queued together each get their own picture and progress."""
    colors = ["red", "lime", "blue", "gray"]
    heard = [RunEventLog() for _ in colors]
    runs = [graphs.through(graphs.steps(3), image=graphs.picture(color)) for color in colors]
    pngs = await asyncio.gather(
        *(bench.engine.run(run, each) for run, each in zip(runs, heard, strict=True))
    )
    assert [graphs.pixels(png) for png in pngs] == [graphs.pixels(run.image) for run in runs]
    assert all(each.fractions == sorted(each.fractions) for each in heard)
    assert all(each.fractions[-1] == 1.0 for each in heard)


async def test_an_unknown_node_is_rejected(bench: Bench) -> None:
    """An invalid graph raises EngineRejected, which is not retryable."""
    with pytest.raises(EngineRejected, match="NoSuchNode") as caught:
        await bench.engine.run(graphs.through(graphs.node("NoSuchNode")), ignore)
    assert not caught.value.retryable


async def test_a_nodes_exception_fails_the_run(bench: Bench) -> None:
    """The error names the node's class and its exception."""
    with pytest.raises(EngineFailed, match=r"TestRaise failed: no such luck") as caught:
        await bench.engine.run(graphs.through(graphs.fail("no such luck")), ignore)
    assert caught.value.details["type"] == "RuntimeError"


@pytest.mark.parametrize(
    "failure",
    [
        graphs.fail("Allocation on device", "out_of_memory"),
        graphs.fail("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        graphs.fail("CUDA error: out of memory"),
    ],
    ids=["torch", "cpu", "library"],
)
async def test_out_of_memory_is_worth_another_attempt(
    bench: Bench, failure: dict[str, object]
) -> None:
    """Rule 15: a lack of memory is retryable, because memory may be free elsewhere or later."""
    with pytest.raises(EngineOutOfMemory) as caught:
        await bench.engine.run(graphs.through(failure), ignore)
    assert caught.value.retryable


async def test_a_success_after_a_failure_is_a_success(bench: Bench) -> None:
    """Rule 17: the flag left by the previous prompt does not decide."""
    with pytest.raises(EngineFailed):
        await bench.engine.run(graphs.through(graphs.fail("first")), ignore)
    assert await bench.engine.run(graphs.through(), ignore)


async def test_what_an_engine_has(bench: Bench) -> None:
    """The node classes of an engine are known before a graph is sent to it."""
    assert {"LoadImage", "SaveImage", "TestSteps"} <= await bench.engine.node_classes()
