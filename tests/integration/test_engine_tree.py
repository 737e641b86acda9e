"""The end of an engine's process tree, when it is stopped, or its owner or guard dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from comfy_pool.process.process import EngineCommand, EngineProcess
from restoration.processes.child import ExitInfo
from tests.fakes.engine_process import (
    ALONE,
    DAEMON,
    DEADLINE_S,
    DEAF,
    SPEAK,
    WITH_CHILD,
    WITH_DAEMON,
    Witness,
    cluster,
    stand_ins,
    witnessing,
)

escapes_without_a_subreaper = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has PR_SET_CHILD_SUBREAPER"
)


@pytest.fixture
def witness() -> Iterator[Witness]:
    with witnessing() as witness:
        yield witness


@pytest.fixture
def engine(tmp_path: Path, witness: Witness) -> Callable[[str], EngineCommand]:
    return stand_ins(tmp_path, witness)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_worker(raylet: int, worker: int) -> None:
    os.kill(worker, signal.SIGKILL)


def kill_worker_with_raylet(raylet: int, worker: int) -> None:
    os.kill(raylet, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)


def kill_whole_group(raylet: int, worker: int) -> None:
    os.killpg(raylet, signal.SIGKILL)


def terminate_worker(raylet: int, worker: int) -> None:
    os.kill(worker, signal.SIGTERM)


def make_worker_exit(raylet: int, worker: int) -> None:
    os.kill(worker, signal.SIGUSR1)


def make_worker_raise(raylet: int, worker: int) -> None:
    os.kill(worker, signal.SIGUSR2)


@pytest.mark.parametrize(
    "die",
    [
        kill_worker,
        kill_worker_with_raylet,
        kill_whole_group,
        terminate_worker,
        make_worker_exit,
        make_worker_raise,
    ],
)
@escapes_without_a_subreaper
async def test_tree_ends_with_its_owner(
    die: Callable[[int, int], None],
    engine: Callable[[str], EngineCommand],
    witness: Witness,
    tmp_path: Path,
) -> None:
    """However a worker ends, its engine and all of the engine's descendants end too."""

    def check() -> None:
        with cluster(engine(WITH_DAEMON), tmp_path) as (raylet, worker):
            witness.release()
            witness.wait_for("engine", "child", "daemon")
            die(raylet, worker)
            witness.wait_for_silence()

    await asyncio.to_thread(check)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_guard_is_no_child_of_its_owner(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """Ray kills a dead worker's children, group and session; the guard belongs to none of them."""
    async with await EngineProcess.start(engine(ALONE)):
        _, guard = witness.wait_for("engine")["engine"]
        assert parent_of(guard) != os.getpid()
        assert os.getsid(guard) != os.getsid(0)
        assert os.getpgid(guard) != os.getpgid(0)


async def test_engine_outlives_the_thread_that_asked_for_it(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """PR_SET_PDEATHSIG fires at the end of a thread, so only the guard's single thread may start
    it."""
    loop = asyncio.get_running_loop()
    started: list[EngineProcess] = []

    def ask() -> None:
        start = EngineProcess.start(engine(SPEAK + 'say("engine")\nsys.stdin.read()\n' + ALONE))
        started.append(asyncio.run_coroutine_threadsafe(start, loop).result())

    thread = threading.Thread(target=ask)
    thread.start()
    await asyncio.to_thread(thread.join)
    async with started[0] as process:
        witness.wait_for("engine")
        assert process.pid == witness.wait_for("engine")["engine"][0]
        os.kill(process.pid, 0)
        assert await exits_within(process, 0.3) is None


async def exits_within(process: EngineProcess, timeout_s: float) -> ExitInfo | None:
    try:
        return await asyncio.wait_for(process.exited(), timeout_s)
    except TimeoutError:
        return None


async def test_engine_ends_with_its_guard(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """A killed guard ends the engine and its group, and the owner is informed."""
    async with await EngineProcess.start(engine(WITH_CHILD)) as process:
        witness.release()
        _, guard = witness.wait_for("engine", "child")["engine"]
        os.kill(guard, signal.SIGKILL)
        assert await exits_within(process, DEADLINE_S) == ExitInfo(None)
        witness.wait_for_silence()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")
async def test_engine_ends_with_guard_and_owner_both(
    engine: Callable[[str], EngineCommand], witness: Witness, tmp_path: Path
) -> None:
    """If guard and owner are both killed, as after running out of memory, the kernel ends the
    engine."""

    def check() -> None:
        with cluster(engine(ALONE), tmp_path) as (raylet, worker):
            witness.release()
            _, guard = witness.wait_for("engine")["engine"]
            os.kill(worker, signal.SIGSTOP)  # so that it cannot react to the end of the guard
            os.kill(guard, signal.SIGKILL)
            kill_worker(raylet, worker)
            witness.wait_for_silence()

    await asyncio.to_thread(check)


@escapes_without_a_subreaper
async def test_what_an_engine_leaves_behind_is_killed(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """exited() returns the engine's own status, once nothing of its tree is left."""
    process = await EngineProcess.start(engine(SPEAK + DAEMON + 'say("engine"); sys.exit(7)'))
    witness.release()
    assert await exits_within(process, DEADLINE_S) == ExitInfo(7)
    assert "daemon" in witness.wait_for("daemon")
    witness.wait_for_silence()


async def test_guard_told_to_end_stops_the_tree(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """SIGTERM to the guard, as at the shutdown of a node, stops the engine's tree."""
    process = await EngineProcess.start(engine(WITH_CHILD))
    witness.release()
    _, guard = witness.wait_for("engine", "child")["engine"]
    os.kill(guard, signal.SIGTERM)
    assert await exits_within(process, DEADLINE_S) == ExitInfo(-signal.SIGTERM)
    witness.wait_for_silence()


POLITE = """
def leave(*_):
    say("farewell")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
"""
STUBBORN = """
signal.signal(signal.SIGTERM, lambda *_: say("asked"))
say("engine")
while True:
    signal.pause()
"""


async def test_stop_lets_an_engine_leave(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """SIGTERM comes first, so that an engine can exit on its own."""
    process = await EngineProcess.start(engine(SPEAK + POLITE + ALONE))
    witness.wait_for("engine")
    await process.stop(DEADLINE_S)
    assert await process.exited() == ExitInfo(0)
    assert "farewell" in witness.wait_for("farewell")


async def test_stop_kills_an_engine_that_will_not_leave(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """After the grace period every process of the tree gets SIGKILL."""
    process = await EngineProcess.start(engine(DEAF + WITH_CHILD))
    witness.release()
    witness.wait_for("engine", "child")
    await process.stop(grace_s=0.2)
    assert await process.exited() == ExitInfo(-signal.SIGKILL)
    witness.wait_for_silence()


async def test_a_second_stop_can_be_less_patient(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """stop() can be called again and concurrently; the shortest grace counts."""
    process = await EngineProcess.start(engine(DEAF + ALONE))
    witness.wait_for("engine")
    begun_at = time.monotonic()
    await asyncio.gather(process.stop(grace_s=600), process.stop(grace_s=0))
    await process.stop()
    assert await process.exited() == ExitInfo(-signal.SIGKILL)
    assert time.monotonic() - begun_at < DEADLINE_S


async def test_owner_that_dies_while_stopping_is_not_waited_for(
    engine: Callable[[str], EngineCommand], witness: Witness, tmp_path: Path
) -> None:
    """A long grace ends with the owner that asked for it."""

    def check() -> None:
        with cluster(engine(SPEAK + STUBBORN), tmp_path) as (raylet, worker):
            witness.release()
            witness.wait_for("engine")
            os.kill(worker, signal.SIGHUP)
            witness.wait_for("asked")
            kill_worker(raylet, worker)
            witness.wait_for_silence()

    await asyncio.to_thread(check)
