"""Early ends of runs: interrupts, dropped sockets, closing, kills and stalls."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from comfy_pool.engine import ComfyEngine
from comfy_pool.process.hosts import AttachedHost
from restoration.engine_port import EngineResult, EngineRun
from restoration.errors import EngineCrashed, EngineInterrupted, EngineStalled, EngineUnavailable
from tests.contracts.engine.bench import DEADLINE_S, LIMITS, Bench, until_running
from tests.fakes import graphs
from tests.fakes.graphs import RunEventLog, ignore
from tests.support.polling import until

# A cancelled run frees its GPU after one step; all its steps would take ten times this.
FREE_S = 50.0


@pytest.mark.cancel
async def test_interrupting_a_running_run(bench: Bench) -> None:
    """Rule 8: it raises EngineInterrupted, and its GPU is free within seconds of a step."""
    run = graphs.through(graphs.steps(10_000, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    interrupted_at = time.monotonic()
    await bench.engine.interrupt(run.id)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(EngineInterrupted):
            await running
    assert await bench.queue() == []
    assert time.monotonic() - interrupted_at < FREE_S


@pytest.mark.cancel
async def test_interrupting_a_queued_run_spares_the_running_one(bench: Bench) -> None:
    """Rule 8: a queued run is removed from the queue, and no other run is interrupted."""
    first, second = graphs.through(graphs.steps(30, 0.05)), graphs.through()
    running = asyncio.create_task(bench.engine.run(first, ignore))
    await until_running(bench, first)
    waiting = asyncio.create_task(bench.engine.run(second, ignore))

    async def both_are_there() -> bool:
        return len(await bench.queue()) == 2

    await until(both_are_there)
    await bench.engine.interrupt(second.id)
    with pytest.raises(EngineInterrupted):
        await waiting
    assert not running.done()
    assert await running


@pytest.mark.cancel
async def test_interrupting_at_a_time_when_it_is_pointless(bench: Bench) -> None:
    """An interrupt that comes twice, after the end or with an unknown id has no effect."""
    run = graphs.through(graphs.steps(1000, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    for _ in range(3):
        await bench.engine.interrupt(run.id)
    with pytest.raises(EngineInterrupted):
        await running
    await bench.engine.interrupt(run.id)
    await bench.engine.interrupt(graphs.through().id)
    assert await bench.engine.run(graphs.through(), ignore)


@pytest.mark.cancel
async def test_an_interrupt_during_a_long_step_is_waited_for(bench: Bench) -> None:
    """Rule 8: a node that holds the thread ends first; the run does not report an end before
    that."""
    run = graphs.through(graphs.hold(1.0), graphs.steps(1000, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    await bench.engine.interrupt(run.id)
    with pytest.raises(EngineInterrupted):
        await running
    assert await bench.queue() == []


@pytest.mark.cancel
async def test_a_cancelled_caller_leaves_nothing_running(bench: Bench) -> None:
    """When the waiting task ends after one or two cancels, its run has ended in the engine."""
    run = graphs.through(graphs.steps(1000, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await bench.queue() == []
    assert await bench.files() == []


async def test_a_dropped_socket_costs_only_progress(bench: Bench) -> None:
    """Rule 4: the run goes on without its socket, and the next run receives events again."""
    run = graphs.through(graphs.steps(20, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    dropped = bench.engine._socket
    assert dropped is not None
    dropped._socket.sock.shutdown(socket.SHUT_RDWR)  # underneath, as a network would
    assert await running
    heard = RunEventLog()
    assert await bench.engine.run(graphs.through(graphs.steps()), heard)
    assert len(heard.fractions) > 4
    assert bench.engine._socket is not None
    assert bench.engine._socket.client_id != dropped.client_id


async def test_an_attached_engine_is_used_and_left_alone(bench: Bench) -> None:
    """An attached engine runs our prompts, and stays alive after we disconnect."""
    async with ComfyEngine(AttachedHost(bench.host.base_url), LIMITS) as attached:
        own, theirs = graphs.through(graphs.steps(), image=graphs.picture("navy")), RunEventLog()
        mine, _ = await asyncio.gather(
            attached.run(own, ignore), bench.engine.run(graphs.through(graphs.steps()), theirs)
        )
        assert graphs.pixels(mine) == graphs.pixels(own.image)
        assert str(own.id) not in await bench.history()
    assert await bench.engine.healthy()
    assert theirs.fractions[-1] == 1.0
    # The protocol has no call that deletes files, so those of an attached engine stay.
    for side in ("input", "output"):
        await asyncio.to_thread(shutil.rmtree, bench.base_dir / side / "comfy-restore")


async def test_an_engine_that_was_closed_takes_no_run(bench: Bench) -> None:
    """A closed engine raises EngineUnavailable, has no threads left, and can be closed again."""
    engine = ComfyEngine(AttachedHost(bench.host.base_url), LIMITS)
    await engine.start()
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(EngineUnavailable):
        await engine.run(graphs.through(), ignore)


async def test_closing_ends_what_runs(bench: Bench) -> None:
    """Closing an engine ends its current run in ComfyUI too, with EngineInterrupted."""
    engine = ComfyEngine(AttachedHost(bench.host.base_url), LIMITS)
    await engine.start()
    run = graphs.through(graphs.steps(1000, 0.05))
    running = asyncio.create_task(engine.run(run, ignore))
    await until_running(bench, run)
    await engine.aclose()
    with pytest.raises(EngineInterrupted):
        await running
    assert await bench.queue() == []
    await asyncio.to_thread(shutil.rmtree, bench.base_dir / "input" / "comfy-restore")


@pytest.fixture
def limited(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that changes the limits of the running engine until the end of the test."""

    def limit(**limits: Any) -> None:
        monkeypatch.setattr(bench.engine, "_limits", replace(LIMITS, **limits))

    return limit


async def two_runs(bench: Bench, first: EngineRun) -> list[asyncio.Task[EngineResult]]:
    """Start `first`, and queue another run behind it."""
    second = graphs.through()
    running = [asyncio.create_task(bench.engine.run(first, ignore))]
    await until_running(bench, first)
    running.append(asyncio.create_task(bench.engine.run(second, ignore)))

    async def both_are_there() -> bool:
        return len(await bench.queue()) == 2

    await until(both_are_there)
    return running


@pytest.mark.isolation
async def test_a_killed_engine_speaks_against_one_run(bench: Bench) -> None:
    """Rule 15: the executing run raises EngineCrashed at once, the queued one EngineUnavailable."""
    running = await two_runs(bench, graphs.through(graphs.steps(1000, 0.05)))
    assert bench.host.pid is not None
    os.kill(bench.host.pid, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineCrashed, EngineUnavailable]
    assert "signal 9" in str(outcomes[0])
    assert not await bench.engine.healthy()
    assert await bench.engine.run(graphs.through(), ignore)
    assert await bench.engine.healthy()


@pytest.mark.deadlines
async def test_a_silent_run_is_interrupted(bench: Bench, limited: Callable[..., None]) -> None:
    """A run without events for too long raises EngineStalled; an engine that obeys stays alive."""
    limited(stall_s=0.5)
    pid = bench.host.pid
    with pytest.raises(EngineStalled, match="sent no message") as caught:
        await bench.engine.run(graphs.through(graphs.steps(1000, 2.0)), ignore)
    assert caught.value.retryable
    assert await bench.engine.healthy()
    assert bench.host.pid == pid


@pytest.mark.deadlines
async def test_an_engine_that_cannot_be_interrupted_is_replaced(
    bench: Bench, limited: Callable[..., None]
) -> None:
    """Its run raises EngineStalled, the queued one EngineUnavailable; the next run has a new
    engine."""
    limited(stall_s=3.0, stall_stop_s=0.5)
    pid = bench.host.pid
    running = await two_runs(bench, graphs.through(graphs.hold(1000)))
    async with asyncio.timeout(DEADLINE_S):
        outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineStalled, EngineUnavailable]
    assert not await bench.engine.healthy()
    assert await bench.engine.run(graphs.through(), ignore)
    assert bench.host.pid != pid


@pytest.mark.deadlines
async def test_an_engine_that_answers_nothing_is_replaced(
    bench: Bench, limited: Callable[..., None]
) -> None:
    """A stopped engine sends neither events nor answers; its run raises EngineStalled."""
    limited(unreachable_s=8.0)
    run = graphs.through(graphs.steps(1000, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    hung = bench.host.pid
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(EngineStalled, match="does not respond"):
            await running
    assert await bench.engine.run(graphs.through(), ignore)
    assert bench.host.pid != hung


@pytest.mark.engine_health
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_an_engine_that_has_grown_too_large_is_replaced(
    bench: Bench, limited: Callable[..., None]
) -> None:
    """Above its memory limit it is restarted between two runs; below, it is kept."""
    limited(memory_limit_bytes=10**15)
    pid = bench.host.pid
    assert await bench.engine.run(graphs.through(), ignore)
    assert bench.host.pid == pid
    limited(memory_limit_bytes=1)
    assert await bench.engine.run(graphs.through(), ignore)
    assert bench.host.pid != pid
