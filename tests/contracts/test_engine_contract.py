"""What every engine must do, held against the scripted stand-in and against a real ComfyUI.

Both run as a process that the engine owns, with the same nodes. Here and in the tests of faults,
"rule" is what ComfyUI's ways ask of a client:

1. execution_success comes before history; only `executing` without a node comes after it
2. history and queue cannot be read as one: look again before a run is called lost
3. events go to the socket of the submitting client only: connect, await the hello, then submit
4. a client id that connects again is forgotten: a new one for each connection, then history
5. a prompt that is cached as a whole names the old file: a folder for each run
6. any prompt id is accepted, also a used one: a fresh one for each run
7. validation can fail in part and still answer 200
8. an interrupt is answered 200 whatever it does, and does not reach what waits: see the outcome
9. history keeps each graph in memory: delete what was used
10. folders are listed on ComfyUI's event loop: keep them empty
11. uploads of the same name are renamed: use the name that is returned
12. pictures are found by path: give the graph names in the run's own folder only
13. an animation is a batch: exactly one picture is expected
15. memory runs out as a node's error, or as a killed process
17. the success flag may be that of another prompt: the messages decide
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from comfy_pool.engine import ComfyEngine
from comfy_pool.hosts import AttachedHost, OwnedHost
from comfy_pool.limits import EngineLimits
from comfy_pool.process import EngineCommand
from restoration.errors import (
    EngineCrashed,
    EngineFailed,
    EngineInterrupted,
    EngineOutOfMemory,
    EngineRejected,
    EngineStalled,
    EngineUnavailable,
)
from restoration.ports import Engine, EngineBegan, EngineEvent, EngineProgress, EngineRun, Prompt
from tests.fakes import comfyui, graphs
from tests.fakes.graphs import Heard, ignore

NODES = Path(comfyui.__file__).with_name("nodes")
LIMITS = EngineLimits(blind_poll_s=0.1, poll_s=1.0, stop_poll_s=0.1)
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Bench:
    engine: ComfyEngine
    host: OwnedHost
    base_dir: Path

    async def history(self) -> dict[str, object]:
        return dict(await self._get("/history"))

    async def queue(self) -> list[object]:
        answer = await self._get("/queue")
        return [*answer["queue_running"], *answer["queue_pending"]]

    async def _get(self, path: str) -> dict[str, list[object]]:
        async with httpx.AsyncClient(base_url=self.host.base_url, trust_env=False) as client:
            answer: dict[str, list[object]] = (await client.get(path)).json()
            return answer

    async def files(self) -> list[str]:
        """What any run has left in the engine's folders."""
        return await asyncio.to_thread(_files, self.base_dir / "input", self.base_dir / "output")


def _files(*folders: Path) -> list[str]:
    return [str(path) for folder in folders for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(
    scope="module", params=["fake", pytest.param("real", marks=pytest.mark.real_engine)]
)
def command(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> EngineCommand:
    """How to start the engine under test."""
    base_dir = tmp_path_factory.mktemp("engine")
    if request.param == "real":
        install = request.getfixturevalue("engine_install")
        python, app_dir, models_dir = install.python, install.app_dir, install.models_dir
        shutil.copytree(NODES, base_dir / "custom_nodes" / "test_nodes")
    else:
        python, app_dir, models_dir = Path(sys.executable), base_dir / "app", base_dir / "weights"
        app_dir.mkdir()
        program = f"import runpy\nrunpy.run_path({comfyui.__file__!r}, run_name='__main__')\n"
        (app_dir / "main.py").write_text(program)
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return EngineCommand(python, app_dir, base_dir, models_dir, free_port(), "cpu", environ)


@pytest.fixture(scope="module")
async def bench(command: EngineCommand) -> AsyncIterator[Bench]:
    host = OwnedHost(command, slot="test")
    async with ComfyEngine(host, LIMITS) as engine:
        yield Bench(engine, host, command.base_dir)


@pytest.fixture(autouse=True)
async def nothing_left(bench: Bench) -> AsyncIterator[None]:
    """No run leaves a file, a history entry or a prompt in the engine (rules 9 and 10)."""
    yield
    assert await bench.files() == []
    assert await bench.history() == {}
    assert await bench.queue() == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 - another process cannot set our event
            await asyncio.sleep(0.02)


async def until_running(bench: Bench, run: EngineRun) -> None:
    """The engine has begun with the run, not merely taken it."""

    async def is_first() -> bool:
        queue = (await bench._get("/queue"))["queue_running"]
        return any(str(run.id) in str(item) for item in queue)

    await until(is_first)


async def test_the_picture_comes_back(bench: Bench) -> None:
    """A run returns, as PNG, the picture that its output node saved."""
    engine: Engine = bench.engine
    image = graphs.picture("orange")
    png = await engine.run(graphs.through(graphs.steps(), image=image), ignore)
    assert png.startswith(b"\x89PNG")
    assert graphs.pixels(png) == graphs.pixels(image)


async def test_progress_rises_from_node_to_node_to_one(bench: Bench) -> None:
    """The fraction never falls, has steps within a node, ends at 1 and names the node's class."""
    heard = Heard()
    await bench.engine.run(graphs.through(graphs.steps(5)), heard)
    assert heard.fractions == sorted(heard.fractions)
    assert heard.fractions[-1] == 1.0
    within = {p.fraction for p in heard.progress if p.node_class == "TestSteps"}
    assert len(within) >= 5
    assert {p.node_class for p in heard.progress} >= {"LoadImage", "TestSteps", "SaveImage"}


async def test_01_a_run_tells_when_its_turn_has_come(bench: Bench) -> None:
    """Once, before its progress; queued behind another, not before that one's last step."""
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
        assert [event for event in events if event == EngineBegan()] == events[:1]


async def test_previews_arrive(bench: Bench) -> None:
    """Pictures of the work so far reach the run that they are of, and no other."""
    with_previews, without = Heard(), Heard()
    await asyncio.gather(
        bench.engine.run(graphs.through(graphs.steps(3, preview=True)), with_previews),
        bench.engine.run(graphs.through(graphs.steps(3)), without),
    )
    assert len(with_previews.previews) == 3
    assert all(p.content_type == "image/jpeg" for p in with_previews.previews)
    assert all(p.data.startswith(b"\xff\xd8") for p in with_previews.previews)
    assert without.previews == []


async def test_each_run_has_folders_of_its_own(bench: Bench) -> None:
    """Rules 5, 10, 11, 12: the names given to the graph lie in a folder named after the run."""
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
    """Rules 3 and 5: what ComfyUI has cached from a run before is right for the next one too."""
    first = await bench.engine.run(graphs.drawn(0x123456), ignore)
    again = await bench.engine.run(graphs.drawn(0x123456), ignore)
    assert graphs.pixels(first) == graphs.pixels(again) == ((12, 8), b"\x12\x34\x56" * 96)


async def test_an_output_outside_the_runs_folder_is_refused(bench: Bench) -> None:
    """Rule 5: a graph that ignores its prefix could return another run's file."""
    with pytest.raises(EngineFailed, match="outside the run's folder"):
        await bench.engine.run(graphs.drawn(1, prefix="elsewhere/output"), ignore)
    await asyncio.to_thread(shutil.rmtree, bench.base_dir / "output" / "elsewhere")


async def test_a_batch_is_no_picture(bench: Bench) -> None:
    """Rule 13: an output of several frames fails instead of losing all but one."""
    with pytest.raises(EngineFailed, match="saved 2 pictures"):
        await bench.engine.run(graphs.drawn(2, batch_size=2), ignore)


async def test_runs_at_once_do_not_mix(bench: Bench) -> None:
    """Rule 11: runs that are queued together each get their own picture and progress."""
    colors = ["red", "lime", "blue", "gray"]
    heard = [Heard() for _ in colors]
    runs = [graphs.through(graphs.steps(3), image=graphs.picture(color)) for color in colors]
    pngs = await asyncio.gather(
        *(bench.engine.run(run, each) for run, each in zip(runs, heard, strict=True))
    )
    assert [graphs.pixels(png) for png in pngs] == [graphs.pixels(run.image) for run in runs]
    assert all(each.fractions == sorted(each.fractions) for each in heard)
    assert all(each.fractions[-1] == 1.0 for each in heard)


async def test_an_unknown_node_is_rejected(bench: Bench) -> None:
    """A graph that does not validate is EngineRejected, which no other attempt can mend."""
    with pytest.raises(EngineRejected, match="NoSuchNode") as caught:
        await bench.engine.run(graphs.through(graphs.node("NoSuchNode")), ignore)
    assert not caught.value.retryable


async def test_a_nodes_exception_fails_the_run(bench: Bench) -> None:
    """The error names the node's class and what it raised."""
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
    """Rule 15: memory that is short now may be free elsewhere or later."""
    with pytest.raises(EngineOutOfMemory) as caught:
        await bench.engine.run(graphs.through(failure), ignore)
    assert caught.value.retryable


async def test_a_success_after_a_failure_is_a_success(bench: Bench) -> None:
    """Rule 17: what the prompt before left behind does not decide."""
    with pytest.raises(EngineFailed):
        await bench.engine.run(graphs.through(graphs.fail("first")), ignore)
    assert await bench.engine.run(graphs.through(), ignore)


async def test_05_interrupting_a_running_run(bench: Bench) -> None:
    """Rule 8: a run that is interrupted ends early, as EngineInterrupted."""
    run = graphs.through(graphs.steps(1000, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    await bench.engine.interrupt(run.id)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(EngineInterrupted):
            await running


async def test_05_interrupting_a_queued_run_spares_the_running_one(bench: Bench) -> None:
    """Rule 8: a run that waits is taken from the queue, and no other is hit."""
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


async def test_05_interrupting_at_a_time_when_it_is_pointless(bench: Bench) -> None:
    """Twice, after the end, or with an id that never was: harmless to all."""
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


async def test_05_an_interrupt_during_a_long_step_is_waited_for(bench: Bench) -> None:
    """Rule 8: a node that holds the thread ends first; the run says nothing before it is over."""
    run = graphs.through(graphs.hold(1.0), graphs.steps(1000, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    await bench.engine.interrupt(run.id)
    with pytest.raises(EngineInterrupted):
        await running
    assert await bench.queue() == []


async def test_05_a_cancelled_caller_leaves_nothing_running(bench: Bench) -> None:
    """When the task that waits is cancelled, twice even, the run has ended when it is done."""
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
    """Rule 4: the run goes on without its socket, and the next one has events again."""
    run = graphs.through(graphs.steps(20, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    dropped = bench.engine._socket
    assert dropped is not None
    dropped._socket.sock.shutdown(socket.SHUT_RDWR)  # underneath, as a network would
    assert await running
    heard = Heard()
    assert await bench.engine.run(graphs.through(graphs.steps()), heard)
    assert len(heard.fractions) > 4
    assert bench.engine._socket is not None
    assert bench.engine._socket.client_id != dropped.client_id


async def test_an_attached_engine_is_used_and_left_alone(bench: Bench) -> None:
    """An engine that is not ours runs our prompts, and lives on when we are gone."""
    async with ComfyEngine(AttachedHost(bench.host.base_url), LIMITS) as attached:
        own, theirs = graphs.through(graphs.steps(), image=graphs.picture("navy")), Heard()
        mine, _ = await asyncio.gather(
            attached.run(own, ignore), bench.engine.run(graphs.through(graphs.steps()), theirs)
        )
        assert graphs.pixels(mine) == graphs.pixels(own.image)
        assert str(own.id) not in await bench.history()
    assert await bench.engine.healthy()
    assert theirs.fractions[-1] == 1.0
    # The protocol has no call that deletes files: those of an attached engine stay.
    for side in ("input", "output"):
        await asyncio.to_thread(shutil.rmtree, bench.base_dir / side / "comfy-restore")


async def test_what_an_engine_has(bench: Bench) -> None:
    """The classes of its nodes are known before any graph is sent to it."""
    assert {"LoadImage", "SaveImage", "TestSteps"} <= await bench.engine.node_classes()


async def test_an_engine_that_was_closed_takes_no_run(bench: Bench) -> None:
    """A closed engine is EngineUnavailable for good, its threads are gone, and closing repeats."""
    engine = ComfyEngine(AttachedHost(bench.host.base_url), LIMITS)
    await engine.start()
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(EngineUnavailable):
        await engine.run(graphs.through(), ignore)


async def test_closing_ends_what_runs(bench: Bench) -> None:
    """A run under way when its engine is closed ends in the engine too, and says so."""
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
    """Gives the living engine other limits for as long as the test lasts."""

    def limit(**limits: Any) -> None:
        monkeypatch.setattr(bench.engine, "_limits", replace(LIMITS, **limits))

    return limit


async def two_runs(bench: Bench, first: EngineRun) -> list[asyncio.Task[bytes]]:
    """`first` executes, and another run waits behind it."""
    second = graphs.through()
    running = [asyncio.create_task(bench.engine.run(first, ignore))]
    await until_running(bench, first)
    running.append(asyncio.create_task(bench.engine.run(second, ignore)))

    async def both_are_there() -> bool:
        return len(await bench.queue()) == 2

    await until(both_are_there)
    return running


async def test_04_a_killed_engine_speaks_against_one_run(bench: Bench) -> None:
    """Rule 15: the run that executed is EngineCrashed, at once; the other, EngineUnavailable."""
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


async def test_06_a_silent_run_is_interrupted(bench: Bench, limited: Callable[..., None]) -> None:
    """A run that tells nothing for too long is EngineStalled; an engine that obeys lives on."""
    limited(stall_s=0.5)
    pid = bench.host.pid
    with pytest.raises(EngineStalled, match="silent") as caught:
        await bench.engine.run(graphs.through(graphs.steps(1000, 2.0)), ignore)
    assert caught.value.retryable
    assert await bench.engine.healthy()
    assert bench.host.pid == pid


async def test_06_an_engine_that_cannot_be_interrupted_is_replaced(
    bench: Bench, limited: Callable[..., None]
) -> None:
    """Its run is EngineStalled, the one behind it EngineUnavailable, the next finds another."""
    limited(stall_s=3.0, stall_stop_s=0.5)
    pid = bench.host.pid
    running = await two_runs(bench, graphs.through(graphs.hold(1000)))
    async with asyncio.timeout(DEADLINE_S):
        outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineStalled, EngineUnavailable]
    assert not await bench.engine.healthy()
    assert await bench.engine.run(graphs.through(), ignore)
    assert bench.host.pid != pid


async def test_06_an_engine_that_answers_nothing_is_replaced(
    bench: Bench, limited: Callable[..., None]
) -> None:
    """Stopped in its tracks it has neither events nor answers; its run is EngineStalled."""
    limited(unreachable_s=2.0)
    run = graphs.through(graphs.steps(1000, 0.05))
    running = asyncio.create_task(bench.engine.run(run, ignore))
    await until_running(bench, run)
    hung = bench.host.pid
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(EngineStalled, match="hangs"):
            await running
    assert await bench.engine.run(graphs.through(), ignore)
    assert bench.host.pid != hung


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_07_an_engine_that_has_grown_too_large_is_replaced(
    bench: Bench, limited: Callable[..., None]
) -> None:
    """Above its limit it is started anew, between two runs; below it, left alone."""
    limited(memory_limit_bytes=10**15)
    pid = bench.host.pid
    assert await bench.engine.run(graphs.through(), ignore)
    assert bench.host.pid == pid
    limited(memory_limit_bytes=1)
    assert await bench.engine.run(graphs.through(), ignore)
    assert bench.host.pid != pid
