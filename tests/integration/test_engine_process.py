"""The process of an engine: its start, its readiness, and its kept output.

Small scripts replace ComfyUI, because the rules are about processes; the last test starts the real
one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from comfy_pool.process.process import EngineCommand, EngineProcess
from comfy_pool.process.slots import Slot, acquire_slot, port_is_free
from restoration.errors import EngineUnavailable
from restoration.processes.child import ExitInfo
from tests.fakes.engine_process import (
    ALONE,
    DEADLINE_S,
    DEAF,
    SPEAK,
    WITH_CHILD,
    Witness,
    stand_ins,
    witnessing,
)

TELLS_WHAT_IS_FROZEN = """
import gc

from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.get("/frozen")
async def frozen(request):
    return web.json_response(gc.get_freeze_count())


NODE_CLASS_MAPPINGS = {}
"""


@pytest.fixture
def witness() -> Iterator[Witness]:
    with witnessing() as witness:
        yield witness


@pytest.fixture
def engine(tmp_path: Path, witness: Witness) -> Callable[[str], EngineCommand]:
    return stand_ins(tmp_path, witness)


@pytest.fixture
def spare_port() -> int:
    while not port_is_free(port := 10_000 + secrets.randbelow(10_000)):
        pass
    return port


async def never() -> bool:
    return False


@pytest.mark.parametrize("after_s", [0, 0.005, 0.02, 0.04, 0.08, 0.15])
async def test_cancelled_start_leaves_nothing(
    after_s: float, engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """No process is left when a cancelled start() has returned."""
    start = asyncio.create_task(EngineProcess.start(engine(DEAF + WITH_CHILD)))
    await asyncio.sleep(after_s)
    start.cancel()
    try:
        await (await start).stop(grace_s=0)
    except asyncio.CancelledError:
        pass
    witness.release()
    while os.read(witness.reader, 4096):  # raises BlockingIOError while a process holds the pipe
        pass


async def test_engine_that_ends_at_once_is_explained(
    engine: Callable[[str], EngineCommand],
) -> None:
    """An engine that exits before it is ready raises an error with its status and last lines."""
    command = engine("for n in range(50): print('line', n)\nraise SystemExit('no such model')")
    async with await EngineProcess.start(command) as process:
        with pytest.raises(EngineUnavailable, match="exited with status 1") as raised:
            await process.wait_ready(never, DEADLINE_S)
    log = raised.value.details["log"]
    assert isinstance(log, list)
    assert log[-2:] == ["line 49", "no such model"]
    assert process.tail(1) == ["no such model"]
    assert (command.base_dir / "engine.log").read_text().splitlines()[0] == "line 0"


async def test_engine_that_is_never_ready_is_late(
    engine: Callable[[str], EngineCommand],
) -> None:
    """wait_ready keeps its deadline even if the probe hangs."""

    async def hang() -> bool:
        await asyncio.Event().wait()
        return True

    async with await EngineProcess.start(engine(ALONE)) as process:
        for probe in (never, hang):
            with pytest.raises(EngineUnavailable, match="not ready within"):
                await process.wait_ready(probe, 0.3)


async def test_ready_when_the_probe_says_so(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """The probe is repeated until it succeeds."""
    answers = iter([False, False, True])

    async def third_time() -> bool:
        return next(answers)

    async with await EngineProcess.start(engine(ALONE)) as process:
        await process.wait_ready(third_time, DEADLINE_S)
        assert next(answers, None) is None


async def test_stalled_loop_does_not_hold_a_talkative_engine_up(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """Megabytes of output are read even while the owner's event loop is blocked."""
    talk = f"{SPEAK}for n in range(40_000): print(n, 'x' * 120)\nsay('done'); signal.pause()"
    lines: list[str] = []
    command = engine(talk)
    async with await EngineProcess.start(command, on_line=lines.append) as process:
        witness.wait_for("done")  # blocks the loop
        await process.stop()
    assert len(lines) == 40_000
    assert lines[-1].startswith("39999 x")
    assert process.tail(500) == lines[-200:]


async def test_log_is_kept_but_bounded(engine: Callable[[str], EngineCommand]) -> None:
    """engine.log is started anew for each engine, and the previous one is kept."""
    command = engine("import os; print(os.getpid())")
    for _ in range(3):
        await (process := await EngineProcess.start(command)).exited()
        log = (command.base_dir / "engine.log").read_text()
        assert log == f"{process.pid}\n"
        previous = command.base_dir / "engine.log.1"
    assert previous.exists()
    assert not (command.base_dir / "engine.log.2").exists()


async def test_faulty_listener_does_not_stop_the_draining(
    engine: Callable[[str], EngineCommand],
) -> None:
    """An exception of on_line is logged, and the output is still read."""

    def fail(line: str) -> None:
        raise ValueError(line)

    command = engine("print('one'); print('10%\\r20%'); print('\\udcff'.encode(errors='replace'))")
    with capture_logs() as logged:
        process = await EngineProcess.start(command, on_line=fail)
        assert await process.exited() == ExitInfo(0)
    assert process.tail(2) == ["20%", "b'?'"]
    assert "engine_listener_failed" in {line["event"] for line in logged}


async def test_engine_finds_its_folders(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """The engine runs in its own folder with the shared models, and gets its port and paths."""
    command = engine("import os, sys; print(os.getcwd(), *os.listdir('models'), *sys.argv[1:])")
    (command.models_dir / "a-model").touch()
    for _ in range(2):  # the second time with existing folders
        process = await EngineProcess.start(command)
        assert await process.exited() == ExitInfo(0)
    cwd, model, *options = process.tail(1)[0].split()
    assert (cwd, model) == (str(command.base_dir), "a-model")
    assert options[:5] == ["--cpu", "--port", "1", "--listen", "127.0.0.1"]
    assert {folder.name for folder in command.base_dir.iterdir() if folder.is_dir()} == {
        *("custom_nodes", "input", "models", "output", "temp", "user")
    }


async def test_folder_that_cannot_be_prepared(engine: Callable[[str], EngineCommand]) -> None:
    """A models folder that is not a link is not replaced, and raises EngineUnavailable."""
    command = engine(ALONE)
    (command.base_dir / "models").mkdir(parents=True)
    with pytest.raises(EngineUnavailable, match="cannot prepare"):
        await EngineProcess.start(command)


async def test_engine_without_an_interpreter(engine: Callable[[str], EngineCommand]) -> None:
    """The error of wait_ready names a missing Python."""
    command = replace(engine(ALONE), python=Path("/nowhere/python"))
    async with await EngineProcess.start(command) as process:
        with pytest.raises(EngineUnavailable, match="status 127") as raised:
            await process.wait_ready(never, DEADLINE_S)
    assert "cannot start /nowhere/python" in str(raised.value.details["log"])


async def test_guard_without_an_interpreter(
    engine: Callable[[str], EngineCommand], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a guard no engine starts, and the error gives the reason."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineUnavailable, match="could not be started") as raised:
        await EngineProcess.start(engine(ALONE))
    assert "cannot start the guard" in str(raised.value.details["log"])


async def test_engine_keeps_the_slot_that_it_inherits(
    engine: Callable[[str], EngineCommand], tmp_path: Path, spare_port: int
) -> None:
    """A slot is free when the engine has ended, not when its worker releases it."""

    async def acquire(timeout_s: float) -> Slot:
        return await acquire_slot([0], tmp_path, base_port=spare_port, timeout_s=timeout_s)

    command = engine("import signal; signal.pause()")
    with await acquire(0) as slot:
        process = await EngineProcess.start(replace(command, inherit_fds=(slot.fd,)))
    with pytest.raises(EngineUnavailable, match="still in use"):
        await acquire(0.2)
    waiting = asyncio.create_task(acquire(DEADLINE_S))
    await process.stop()
    (await waiting).release()


@pytest.mark.real_engine
async def test_real_comfyui(engine_install: Any, tmp_path: Path, spare_port: int) -> None:
    """A real ComfyUI starts without errors, answers, and leaves neither process nor port. Its
    garbage collector skips PyTorch and ComfyUI itself."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "frozen.py").write_text(TELLS_WHAT_IS_FROZEN)
    command = EngineCommand(
        python=engine_install.python,
        app_dir=engine_install.app_dir,
        base_dir=tmp_path,
        models_dir=engine_install.models_dir,
        port=spare_port,
        variant="cpu",
        environ=os.environ,
        pixels_dir=tmp_path / "pixels",
    )
    url = f"http://127.0.0.1:{spare_port}/system_stats"
    async with httpx.AsyncClient() as client:

        async def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return (await client.get(url)).is_success
            return False

        async with await EngineProcess.start(command) as process:
            await process.wait_ready(answers, timeout_s=180)
            system = (await client.get(url)).json()["system"]
            assert "--cpu" in system["argv"]
            assert (await client.get(url.replace("system_stats", "frozen"))).json() > 100_000
    assert await process.exited() == ExitInfo(-signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    assert port_is_free(spare_port)
    assert "Failed to initialize database" not in (tmp_path / "engine.log").read_text()
