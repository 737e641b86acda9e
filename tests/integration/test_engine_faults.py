"""Engines with failures of ComfyUI, or of its network, that a real one cannot be made to have.

A scripted fake on a real socket; "rule" numbers are those of the contract suite.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from comfy_pool.engine import ComfyEngine
from comfy_pool.limits import EngineLimits
from comfy_pool.process.hosts import AttachedHost
from restoration.errors import (
    EngineCrashed,
    EngineError,
    EngineFailed,
    EngineInterrupted,
    EngineRejected,
    EngineStalled,
    EngineUnavailable,
)
from tests.fakes import graphs
from tests.fakes.comfyui import serving
from tests.fakes.comfyui_engines import DEADLINE_S, LIMITS, scripted
from tests.fakes.comfyui_worker import Script
from tests.fakes.graphs import RunEventLog, ignore
from tests.support.polling import until


async def test_success_is_not_yet_history(tmp_path: Path) -> None:
    """Rule 1: execution_success comes before the history entry; the run waits for the later
    event."""
    async with scripted(tmp_path, Script(history_delay_s=0.3)) as (fake, engine):
        assert await engine.run(graphs.through(), ignore)
        assert fake.calls["GET /history"] == 1


async def test_between_queue_and_history_a_run_is_not_lost(tmp_path: Path) -> None:
    """Rule 2: a run found in neither is looked up once more before it counts as lost."""
    async with scripted(tmp_path, Script(history_misses=1)) as (fake, engine):
        assert await engine.run(graphs.through(), ignore)
        assert fake.calls["GET /history"] == 2


async def test_the_hello_comes_before_the_prompt(tmp_path: Path) -> None:
    """Rule 3: a prompt is submitted only after ComfyUI has greeted the client."""
    async with scripted(tmp_path, Script(hello_delay_s=0.3)) as (fake, engine):
        run = graphs.through()
        assert await engine.run(run, ignore)
        assert fake.log[:2] == [
            f"hello {fake.client_ids[0]}",
            f"prompt {run.id} of {fake.client_ids[0]}",
        ]


@pytest.mark.parametrize(
    "moment",
    ["execution_start", "executing", "progress", "executed", "execution_success"],
)
async def test_a_socket_dropped_at_any_point(tmp_path: Path, moment: str) -> None:
    """Rule 4: the run ends by its history; the next run has a new client id and receives events."""
    async with scripted(tmp_path, Script(drop_sockets_at=moment)) as (fake, engine):
        for _ in range(2):
            run = graphs.through(graphs.steps())
            assert graphs.pixels(await engine.run(run, ignore)) == graphs.pixels(run.image)
        assert len(fake.client_ids) == len(set(fake.client_ids)) == 2


async def test_one_socket_serves_many_runs(tmp_path: Path) -> None:
    """A connection is opened once, not for each run."""
    async with scripted(tmp_path, Script()) as (fake, engine):
        await asyncio.gather(*(engine.run(graphs.through(), ignore) for _ in range(3)))
        assert len(fake.client_ids) == 1


async def test_a_prompt_goes_by_the_runs_id(tmp_path: Path) -> None:
    """Rule 6: the prompt id is the run's id, and is never in the engine twice."""
    async with scripted(tmp_path, Script()) as (fake, engine):
        run = graphs.through(graphs.steps(5))
        first = asyncio.create_task(engine.run(run, ignore))
        await until(lambda: "executing" in fake.worker.sent)
        with pytest.raises(EngineRejected, match="already"):
            await engine.run(run, ignore)
        assert await first
        assert [line for line in fake.log if line.startswith(f"prompt {run.id} of")]


async def test_validation_that_fails_in_part(tmp_path: Path) -> None:
    """Rule 7: a 200 with node errors is a rejection, and the queued rest is removed."""
    problem = {"type": "value_not_in_list", "message": "Value not in list", "details": "model"}
    node_errors = {"4": {"class_type": "Loader", "errors": [problem], "dependent_outputs": []}}
    async with scripted(tmp_path, Script(node_errors=node_errors)) as (fake, engine):
        with pytest.raises(EngineRejected) as caught:
            await engine.run(graphs.through(graphs.steps(1000, 0.05)), ignore)
        assert caught.value.details["node_errors"] == {"4": ["Loader: Value not in list: model"]}
        assert (fake.worker.pending, fake.worker.running, fake.worker.history) == ([], None, {})


@pytest.mark.cancel
async def test_a_lost_interrupt_is_repeated(tmp_path: Path) -> None:
    """Rule 8: a 200 proves nothing, so the interrupt is repeated until the outcome shows."""
    async with scripted(tmp_path, Script(ignore_interrupts=3)) as (fake, engine):
        run = graphs.through(graphs.steps(1000, 0.02))
        running = asyncio.create_task(engine.run(run, ignore))
        await until(lambda: "progress" in fake.worker.sent)
        await engine.interrupt(run.id)
        with pytest.raises(EngineInterrupted):
            await running
        assert fake.calls["POST /interrupt"] >= 4


async def test_an_interrupt_by_somebody_else(tmp_path: Path) -> None:
    """A run that another client interrupted is retryable."""
    async with scripted(tmp_path, Script(interrupt_unasked=True)) as (_, engine):
        with pytest.raises(EngineCrashed, match="another client") as caught:
            await engine.run(graphs.through(), ignore)
        assert caught.value.retryable


async def test_a_run_that_cannot_be_stopped_is_given_up(tmp_path: Path) -> None:
    """A run that does not stop ends with EngineStalled after a time."""
    limits = EngineLimits(stop_poll_s=0.02, stop_s=0.3)
    async with scripted(tmp_path, Script(ignore_interrupts=10_000), limits) as (fake, engine):
        run = graphs.through(graphs.steps(1000, 0.05))
        running = asyncio.create_task(engine.run(run, ignore))
        await until(lambda: "progress" in fake.worker.sent)
        await engine.interrupt(run.id)
        with pytest.raises(EngineStalled, match="did not stop"):
            await running


@pytest.mark.cancel
async def test_an_interrupt_before_the_prompt_is_there(tmp_path: Path) -> None:
    """A run interrupted while its picture is being uploaded is never submitted."""
    async with scripted(tmp_path, Script(hello_delay_s=2.0)) as (fake, engine):
        run = graphs.through()
        running = asyncio.create_task(engine.run(run, ignore))
        await until(lambda: fake.client_ids)
        await engine.interrupt(run.id)
        with pytest.raises(EngineInterrupted):
            await running
        assert fake.calls["POST /prompt"] == 0


async def test_the_name_that_the_upload_returned_is_used(tmp_path: Path) -> None:
    """Rule 11: ComfyUI may store a picture under another name than the one sent."""
    async with scripted(tmp_path, Script(rename_uploads=True)) as (_, engine):
        run = graphs.through(image=graphs.picture("olive"))
        assert graphs.pixels(await engine.run(run, ignore)) == graphs.pixels(run.image)


@pytest.mark.parametrize("status_str", ["success", "error"])
async def test_the_success_flag_does_not_decide(tmp_path: Path, status_str: str) -> None:
    """Rule 17: the flag may belong to the previous prompt; the messages decide."""
    async with scripted(tmp_path, Script(status_str=status_str)) as (_, engine):
        assert await engine.run(graphs.through(), ignore)
        with pytest.raises(EngineFailed, match="no luck"):
            await engine.run(graphs.through(graphs.fail("no luck")), ignore)


async def test_a_run_that_the_engine_forgot(tmp_path: Path) -> None:
    """A run that a living engine does not know ends with EngineCrashed instead of hanging."""
    limits = EngineLimits(poll_s=0.2)
    async with scripted(tmp_path, Script(forget=True), limits) as (_, engine):
        with pytest.raises(EngineCrashed, match="no longer knows") as caught:
            await engine.run(graphs.through(), ignore)
        assert caught.value.retryable


async def test_frames_outside_the_protocol(tmp_path: Path) -> None:
    """Unknown and malformed frames are ignored, and the others are used."""
    async with scripted(tmp_path, Script(noise=True)) as (_, engine):
        heard = RunEventLog()
        assert await engine.run(graphs.through(graphs.steps(3, preview=True)), heard)
        assert len(heard.previews) == 3
        assert len(heard.fractions) > 3


async def test_previews_without_metadata(tmp_path: Path) -> None:
    """A preview without metadata belongs to the running prompt."""
    async with scripted(tmp_path, Script(plain_previews=True)) as (_, engine):
        first, second = RunEventLog(), RunEventLog()
        await asyncio.gather(
            engine.run(graphs.through(graphs.steps(2, preview=True)), first),
            engine.run(graphs.through(graphs.steps(3, preview=True)), second),
        )
        assert (len(first.previews), len(second.previews)) == (2, 3)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/upload", EngineUnavailable), ("/prompt", EngineCrashed), ("/view", EngineCrashed)],
)
async def test_a_server_error_is_retryable(
    tmp_path: Path, path: str, kind: type[EngineError]
) -> None:
    """A 500 is retryable, EngineUnavailable before the prompt is sent, and leaves nothing
    behind."""
    async with scripted(tmp_path, Script(refuse={path: 1})) as (fake, engine):
        with pytest.raises(kind) as caught:
            await engine.run(graphs.through(), ignore)
        assert caught.value.retryable
        assert (fake.worker.pending, fake.worker.running, fake.worker.history) == ([], None, {})
        assert await engine.run(graphs.through(), ignore)


@pytest.mark.parametrize("path", ["/history", "/queue"])
async def test_a_passing_error_while_a_run_goes_on(tmp_path: Path, path: str) -> None:
    """Failed requests for a moment do not fail the run."""
    limits = EngineLimits(poll_s=0.05, unreachable_s=5.0)
    async with scripted(tmp_path, Script(refuse={path: 3}), limits) as (_, engine):
        assert await engine.run(graphs.through(graphs.steps(20)), ignore)


@pytest.mark.parametrize("path", ["/upload", "/prompt", "/history", "/ws", "/view"])
async def test_an_engine_that_never_answers(tmp_path: Path, path: str) -> None:
    """Whichever request hangs, the run ends with a retryable error."""
    async with scripted(tmp_path, Script(hang=frozenset({path}))) as (_, engine):
        with pytest.raises(EngineError) as caught:
            await engine.run(graphs.through(), ignore)
        assert caught.value.retryable


async def test_an_attached_engine_that_vanishes(tmp_path: Path) -> None:
    """Its runs end soon with a retryable error; once it is back, the same engine object works."""
    async with asyncio.timeout(DEADLINE_S), serving(tmp_path) as fake:
        port = int(fake.url.rpartition(":")[2])
    async with asyncio.timeout(DEADLINE_S), serving(tmp_path, port=port) as fake:
        engine = ComfyEngine(AttachedHost(fake.url), LIMITS)
        await engine.start()
        running = asyncio.create_task(engine.run(graphs.through(graphs.hold(30)), ignore))
        await until(lambda: "executing" in fake.worker.sent)
    with pytest.raises(EngineStalled, match="no response"):
        await running
    assert not await engine.healthy()
    async with asyncio.timeout(DEADLINE_S), serving(tmp_path, port=port):
        assert await engine.run(graphs.through(), ignore)
        await engine.aclose()


async def test_nobody_there(tmp_path: Path) -> None:
    """An attached engine that cannot be reached raises EngineUnavailable at the start."""
    async with serving(tmp_path) as fake:
        url = fake.url
    with pytest.raises(EngineUnavailable, match="no ComfyUI responds"):
        async with ComfyEngine(AttachedHost(url), LIMITS):
            pass


async def test_a_cancel_while_nothing_answers(tmp_path: Path) -> None:
    """A cancelled caller still gets its CancelledError within a bounded time."""
    async with scripted(tmp_path, Script(hang=frozenset({"/history"}))) as (fake, engine):
        running = asyncio.create_task(engine.run(graphs.through(graphs.hold(30)), ignore))
        await until(lambda: "executing" in fake.worker.sent)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
