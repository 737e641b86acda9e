"""Engine health: hung, worn, dead or unstartable engines, tested on the fake.

The contract suite tests on a real ComfyUI what can be tested there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from comfy_pool.doctor.engine import examine_starts
from comfy_pool.engine import ComfyEngine
from comfy_pool.limits import EngineLimits
from comfy_pool.process.hosts import OwnedHost
from comfy_pool.process.memory import resident_bytes
from comfy_pool.process.process import EngineCommand
from restoration.errors import (
    EngineInterrupted,
    EngineRejected,
    EngineStalled,
    EngineUnavailable,
)
from tests.fakes import graphs
from tests.fakes.comfyui_engines import (
    DEADLINE_S,
    LIMITS,
    mend,
    scripted,
    spoil,
    stand_in,
)
from tests.fakes.comfyui_worker import Script
from tests.fakes.graphs import RunEventLog, ignore
from tests.support.polling import until

PAUSES = EngineLimits(first_pause_s=0.02, longest_pause_s=0.1)


@pytest.fixture
def command(tmp_path: Path) -> EngineCommand:
    return stand_in(tmp_path)


@pytest.mark.deadlines
async def test_a_run_that_waits_its_turn_does_not_stall(tmp_path: Path) -> None:
    """Only the executing run must send events; a queued run may wait for longer than the limit."""
    limits = replace(LIMITS, stall_s=2.0)
    async with scripted(tmp_path, Script(), limits) as (_, engine):
        runs = [graphs.through(graphs.steps(12, 0.25)), graphs.through()]
        assert all(await asyncio.gather(*(engine.run(run, ignore) for run in runs)))


@pytest.mark.deadlines
async def test_a_run_that_cannot_be_heard_does_not_stall(tmp_path: Path) -> None:
    """A dropped socket explains the silence, and costs the run only its progress."""
    limits = replace(LIMITS, stall_s=2.0)
    async with scripted(tmp_path, Script(drop_sockets_at="executing"), limits) as (_, engine):
        assert await engine.run(graphs.through(graphs.steps(12, 0.25)), ignore)


@pytest.mark.deadlines
async def test_an_engine_that_begins_nothing_is_hung(tmp_path: Path) -> None:
    """A ComfyUI whose execution thread has died accepts prompts and answers, but executes
    nothing."""
    limits = replace(LIMITS, stall_s=0.2, stall_stop_s=0.2)
    async with scripted(tmp_path, Script(begin_nothing=True), limits) as (fake, engine):
        with pytest.raises(EngineStalled, match="cannot be interrupted") as caught:
            await engine.run(graphs.through(), ignore)
        assert caught.value.retryable
        assert not await engine.healthy()
        assert fake.worker.pending == []


@pytest.mark.cancel
async def test_a_cancel_of_a_stalled_run_is_a_cancel(tmp_path: Path) -> None:
    """If a stalled run is interrupted as well, it ends with EngineInterrupted."""
    limits = replace(LIMITS, stall_s=0.2)
    async with scripted(tmp_path, Script(), limits) as (fake, engine):
        run = graphs.through(graphs.steps(1000, 1.0))
        running = asyncio.create_task(engine.run(run, ignore))
        await until(lambda: fake.calls["POST /interrupt"])
        await engine.interrupt(run.id)
        with pytest.raises(EngineInterrupted):
            await running


@pytest.mark.engine_health
async def test_a_fault_while_idle_is_mended(command: EngineCommand) -> None:
    """The health probe notices the fault; a run, or `start`, repairs it."""
    host = OwnedHost(command)
    async with asyncio.timeout(DEADLINE_S), ComfyEngine(host, EngineLimits(probe_s=0.5)) as engine:
        hung = host.pid
        assert hung is not None
        os.kill(hung, signal.SIGSTOP)
        assert not await engine.healthy()
        assert await engine.run(graphs.through(), ignore)
        assert host.pid is not None
        assert host.pid != hung
        os.kill(host.pid, signal.SIGKILL)
        while await engine.healthy():
            pass
        await engine.start()
        assert await engine.healthy()


@pytest.mark.engine_health
async def test_an_engine_is_started_anew_after_so_many_runs(command: EngineCommand) -> None:
    """An engine serves that many runs, with any outcome, and is then restarted."""
    host = OwnedHost(command)
    limits = replace(PAUSES, restart_after_runs=2)
    async with asyncio.timeout(DEADLINE_S), ComfyEngine(host, limits) as engine:
        pids = []
        for _ in range(3):
            await engine.run(graphs.through(), ignore)
            pids.append(host.pid)
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 1]


@pytest.mark.engine_health
async def test_an_engine_is_never_started_anew_under_a_run(command: EngineCommand) -> None:
    """The run that finds the engine worn waits until the current runs have ended."""
    host = OwnedHost(command)
    limits = replace(PAUSES, restart_after_runs=1)
    async with asyncio.timeout(DEADLINE_S), ComfyEngine(host, limits) as engine:
        heard = RunEventLog()
        first = asyncio.create_task(engine.run(graphs.through(graphs.steps(20, 0.05)), heard))
        await until(lambda: heard.fractions)
        worn = host.pid
        with pytest.raises(EngineRejected):
            await engine.run(graphs.through(graphs.node("NoSuchNode")), ignore)
        assert await engine.run(graphs.through(), ignore)
        assert first.done()
        assert await first
        assert host.pid != worn


@pytest.mark.engine_health
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_whole_tree() -> None:
    """The memory of an engine's children counts as the engine's."""
    alone = resident_bytes(os.getpid())
    program = "import sys; held = bytearray(b'x') * 50_000_000; print(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert resident_bytes(os.getpid()) > alone + 40_000_000
        child.kill()


@pytest.mark.engine_health
async def test_an_engine_that_cannot_start_is_broken(command: EngineCommand) -> None:
    """After so many failed starts the engine is broken, with its last output; a good start repairs
    it."""
    await asyncio.to_thread(spoil, command.app_dir, "no such device")
    engine = ComfyEngine(OwnedHost(command), replace(PAUSES, broken_after_starts=3))
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(3):
            assert engine.broken is None
            with pytest.raises(EngineUnavailable):
                await engine.run(graphs.through(), ignore)
        assert engine.broken is not None
        assert "no such device" in str(engine.broken.details["log"])
        await asyncio.to_thread(mend, command.app_dir)
        assert await engine.run(graphs.through(), ignore)
        assert engine.broken is None
        await engine.aclose()


@pytest.mark.engine_health
async def test_the_pause_before_a_start_ends_with_the_engine(command: EngineCommand) -> None:
    """Closing does not wait for the backoff, and a waiting start raises EngineUnavailable."""
    await asyncio.to_thread(spoil, command.app_dir, "no such device")
    engine = ComfyEngine(OwnedHost(command), EngineLimits(first_pause_s=600, longest_pause_s=600))
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(EngineUnavailable, match="status 1"):
            await engine.start()
        waiting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        await engine.aclose()
        with pytest.raises(EngineUnavailable, match="closed"):
            await waiting


@pytest.mark.engine_health
async def test_the_doctor_shows_why_an_engine_does_not_start(tmp_path: Path) -> None:
    """The doctor shows the engine's last lines after a failed start, and nothing after a good
    one."""
    command = replace(stand_in(tmp_path), base_dir=tmp_path / "engines" / "8188")
    await asyncio.to_thread(spoil, command.app_dir, "no such device")
    engine = ComfyEngine(OwnedHost(command), PAUSES)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(EngineUnavailable):
            await engine.start()
        [finding] = await asyncio.to_thread(examine_starts, tmp_path / "engines")
        assert (finding.name, finding.ok) == ("engine 8188", False)
        assert "exited with status 1" in finding.detail
        assert "no such device" in finding.detail
        assert "engine.log" in finding.remedy
        await asyncio.to_thread(mend, command.app_dir)
        await engine.start()
        [finding] = await asyncio.to_thread(examine_starts, tmp_path / "engines")
        assert finding.ok
        await engine.aclose()


@pytest.fixture
def leftover(command: EngineCommand) -> Path:
    """Create the folder of a run whose worker was killed."""
    folder = command.base_dir / "input" / "comfy-restore" / str(uuid.uuid4())
    folder.mkdir(parents=True)
    return folder


@pytest.mark.engine_health
async def test_leftovers_are_cleared(command: EngineCommand, leftover: Path) -> None:
    """Files of a predecessor's runs are deleted before the engine is ready."""
    async with asyncio.timeout(DEADLINE_S), ComfyEngine(OwnedHost(command)) as engine:
        assert not await asyncio.to_thread(leftover.exists)
        assert await engine.healthy()


@pytest.mark.upgrades
async def test_an_engine_that_was_started_has_its_version(tmp_path: Path) -> None:
    """The version is that which the engine reports, for the worker's reports."""
    async with scripted(tmp_path, Script(), LIMITS) as (_, engine):
        assert engine.version == "fake"
