"""The process tree of an engine: started, drained, stopped, and gone whatever ends its owner.

Small scripts stand in for ComfyUI, since the rules are about processes; the last test starts the
real one. Every process of a tree holds the write end of a pipe, the witness: it speaks there, and
end of file proves that the whole tree is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from comfy_pool.process import EngineCommand, EngineProcess, ExitInfo
from comfy_pool.slots import Slot, acquire_slot, port_is_free
from restoration.errors import EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 30.0

SPEAK = """
import os, signal, sys
def say(word):
    os.write(int(os.environ["WITNESS"]), f"{word} {os.getpid()} {os.getppid()}\\n".encode())
"""
ALONE = SPEAK + 'say("engine"); signal.pause()\n'
WITH_CHILD = (
    SPEAK + 'if os.fork() == 0: say("child"); signal.pause()\nsay("engine"); signal.pause()'
)
# a daemon leaves the group and the session of the engine, and loses its parent
DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        say("daemon")
        signal.pause()
    os._exit(0)
os.wait()
"""
WITH_DAEMON = SPEAK + DAEMON + WITH_CHILD
escapes_without_a_subreaper = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has PR_SET_CHILD_SUBREAPER"
)

# As Ray has it: a raylet starts the worker that owns the engine.
RAYLET = """
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, *sys.argv[1:]], pass_fds=[int(os.environ["WITNESS"])])
os.close(int(os.environ["WITNESS"]))
print(worker.pid, flush=True)
worker.wait()
sys.stdin.read()
"""
WORKER = """
import asyncio, os, signal, sys
from pathlib import Path
from comfy_pool.process import EngineCommand, EngineProcess

async def main():
    folder = Path(sys.argv[1])
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, os._exit, 3)
    loop.add_signal_handler(signal.SIGUSR2, asyncio.current_task().cancel)
    process = await EngineProcess.start(EngineCommand(
        python=Path(sys.executable), app_dir=folder / "app", base_dir=folder / "base",
        models_dir=folder / "models", port=1, variant="cpu", environ=os.environ,
        inherit_fds=(int(os.environ["WITNESS"]),),
    ))
    wanted = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, wanted.set)
    await wanted.wait()
    await process.stop(grace_s=600)

asyncio.run(main())
"""


class Witness:
    """A pipe that every process of a tree holds open."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.heard = b""

    def release(self) -> None:
        """Close our own write end: end of file then speaks of the others."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def wait_for(self, *words: str) -> dict[str, tuple[int, int]]:
        """Block until each word was said; who said it: its pid and its parent's."""
        while missing := set(words) - {line.split()[0] for line in self._lines()}:
            assert self._read(), f"the tree ended without a word of {missing}"
        return {word: (int(pid), int(ppid)) for word, pid, ppid in map(str.split, self._lines())}

    def wait_for_silence(self) -> None:
        """Block until no process holds the pipe."""
        self.release()
        while self._read():
            pass

    def _lines(self) -> list[str]:
        return self.heard.decode().split("\n")[:-1]

    def _read(self) -> bytes:
        ready, _, _ = select.select([self.reader], [], [], DEADLINE_S)
        assert ready, f"nobody spoke or ended in time; heard so far: {self.heard!r}"
        data = os.read(self.reader, 4096)
        self.heard += data
        return data


@pytest.fixture
def witness() -> Iterator[Witness]:
    witness = Witness()
    yield witness
    witness.release()
    os.close(witness.reader)


@pytest.fixture
def engine(tmp_path: Path, witness: Witness) -> Callable[[str], EngineCommand]:
    """Builds the command of a stand-in engine out of its main.py."""

    def build(script: str) -> EngineCommand:
        for folder in ("app", "models"):
            (tmp_path / folder).mkdir()
        (tmp_path / "app" / "main.py").write_text(script)
        return EngineCommand(
            python=Path(sys.executable),
            app_dir=tmp_path / "app",
            base_dir=tmp_path / "base",
            models_dir=tmp_path / "models",
            port=1,
            variant="cpu",
            environ={**os.environ, "WITNESS": str(witness.writer)},
            inherit_fds=(witness.writer,),
        )

    return build


@pytest.fixture
def spare_port() -> int:
    while not port_is_free(port := 10_000 + secrets.randbelow(10_000)):
        pass
    return port


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def never() -> bool:
    return False


@contextlib.contextmanager
def cluster(command: EngineCommand, folder: Path) -> Iterator[tuple[int, int]]:
    """The pids of a raylet and of its worker, which starts the engine."""
    raylet = subprocess.Popen(
        [sys.executable, "-c", RAYLET, "-c", WORKER, str(folder)],
        env=command.environ,
        pass_fds=command.inherit_fds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with raylet:
        assert raylet.stdout
        try:
            yield raylet.pid, int(raylet.stdout.readline())
        finally:
            raylet.kill()


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
    """However a worker ends, its engine ends, and so does all the engine started."""

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
    """Ray kills a dead worker's children, group and session: the guard is in none of these."""
    async with await EngineProcess.start(engine(ALONE)):
        _, guard = witness.wait_for("engine")["engine"]
        assert parent_of(guard) != os.getpid()
        assert os.getsid(guard) != os.getsid(0)
        assert os.getpgid(guard) != os.getpgid(0)


async def test_engine_outlives_the_thread_that_asked_for_it(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """PR_SET_PDEATHSIG fires when a thread ends: only the guard's single thread may matter."""
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
    """A guard that is killed takes the engine and its group along, and the owner hears of it."""
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
    """Where nobody is left to stop the engine, as after an OOM kill of both, the kernel does."""

    def check() -> None:
        with cluster(engine(ALONE), tmp_path) as (raylet, worker):
            witness.release()
            _, guard = witness.wait_for("engine")["engine"]
            os.kill(worker, signal.SIGSTOP)  # it must not act on the guard's end
            os.kill(guard, signal.SIGKILL)
            kill_worker(raylet, worker)
            witness.wait_for_silence()

    await asyncio.to_thread(check)


@escapes_without_a_subreaper
async def test_what_an_engine_leaves_behind_is_killed(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """exited() returns the engine's own status, and only when nothing of its tree is left."""
    process = await EngineProcess.start(engine(SPEAK + DAEMON + 'say("engine"); sys.exit(7)'))
    witness.release()
    assert await exits_within(process, DEADLINE_S) == ExitInfo(7)
    assert "daemon" in witness.wait_for("daemon")
    witness.wait_for_silence()


async def test_guard_told_to_end_stops_the_tree(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """SIGTERM to the guard, as at the shutdown of a node, is a wish to stop, not a leak."""
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
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


STUBBORN = """
signal.signal(signal.SIGTERM, lambda *_: say("asked"))
say("engine")
while True:
    signal.pause()
"""


async def test_stop_lets_an_engine_leave(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """SIGTERM comes first, so that an engine can end in its own way."""
    process = await EngineProcess.start(engine(SPEAK + POLITE + ALONE))
    witness.wait_for("engine")
    await process.stop(DEADLINE_S)
    assert await process.exited() == ExitInfo(0)
    assert "farewell" in witness.wait_for("farewell")


async def test_stop_kills_an_engine_that_will_not_leave(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """After the grace comes SIGKILL, for every process of the tree."""
    process = await EngineProcess.start(engine(DEAF + WITH_CHILD))
    witness.release()
    witness.wait_for("engine", "child")
    await process.stop(grace_s=0.2)
    assert await process.exited() == ExitInfo(-signal.SIGKILL)
    witness.wait_for_silence()


async def test_a_second_stop_can_be_less_patient(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """stop() can be called twice, at once and again; the shortest grace counts."""
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
    """A long grace that an owner asked for ends with the owner."""

    def check() -> None:
        with cluster(engine(SPEAK + STUBBORN), tmp_path) as (raylet, worker):
            witness.release()
            witness.wait_for("engine")
            os.kill(worker, signal.SIGHUP)
            witness.wait_for("asked")
            kill_worker(raylet, worker)
            witness.wait_for_silence()

    await asyncio.to_thread(check)


@pytest.mark.parametrize("after_s", [0, 0.005, 0.02, 0.04, 0.08, 0.15])
async def test_cancelled_start_leaves_nothing(
    after_s: float, engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """Whenever start() is cancelled, no process is left once it has returned."""
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
    """An engine that exits before it is ready raises with its status and its last lines."""
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
    """wait_ready keeps its deadline, also while the probe itself hangs."""

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
    """The probe is asked again until it agrees."""
    answers = iter([False, False, True])

    async def third_time() -> bool:
        return next(answers)

    async with await EngineProcess.start(engine(ALONE)) as process:
        await process.wait_ready(third_time, DEADLINE_S)
        assert next(answers, None) is None


async def test_stalled_loop_does_not_hold_a_talkative_engine_up(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """Megabytes of output are drained while the owner's event loop does nothing at all."""
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
    """engine.log starts anew with each engine, and keeps the one before."""
    command = engine("import os; print(os.getpid())")
    for _ in range(3):
        await (process := await EngineProcess.start(command)).exited()
        log = (command.base_dir / "engine.log").read_text()
        assert log == f"{process.pid}\n"
        previous = command.base_dir / "engine.log.1"
    assert previous.exists()
    assert not (command.base_dir / "engine.log.2").exists()


async def test_faulty_listener_does_not_stop_the_draining(
    engine: Callable[[str], EngineCommand], caplog: pytest.LogCaptureFixture
) -> None:
    """What on_line raises is logged, and the engine goes on."""

    def fail(line: str) -> None:
        raise ValueError(line)

    command = engine("print('one'); print('10%\\r20%'); print('\\udcff'.encode(errors='replace'))")
    process = await EngineProcess.start(command, on_line=fail)
    assert await process.exited() == ExitInfo(0)
    assert process.tail(2) == ["20%", "b'?'"]
    assert "listener" in caplog.text


async def test_engine_finds_its_folders(
    engine: Callable[[str], EngineCommand], witness: Witness
) -> None:
    """It runs in its own folder, with the shared models, and is told its port and its paths."""
    command = engine("import os, sys; print(os.getcwd(), *os.listdir('models'), *sys.argv[1:])")
    (command.models_dir / "a-model").touch()
    for _ in range(2):  # the folders may exist already
        process = await EngineProcess.start(command)
        assert await process.exited() == ExitInfo(0)
    cwd, model, *options = process.tail(1)[0].split()
    assert (cwd, model) == (str(command.base_dir), "a-model")
    assert options[:5] == ["--cpu", "--port", "1", "--listen", "127.0.0.1"]
    assert {folder.name for folder in command.base_dir.iterdir() if folder.is_dir()} == {
        *("custom_nodes", "input", "models", "output", "temp", "user")
    }


async def test_folder_that_cannot_be_prepared(engine: Callable[[str], EngineCommand]) -> None:
    """Somebody's own models folder is not replaced by a link: EngineUnavailable instead."""
    command = engine(ALONE)
    (command.base_dir / "models").mkdir(parents=True)
    with pytest.raises(EngineUnavailable, match="cannot prepare"):
        await EngineProcess.start(command)


async def test_engine_without_an_interpreter(engine: Callable[[str], EngineCommand]) -> None:
    """A missing Python is named in the error that wait_ready raises."""
    command = replace(engine(ALONE), python=Path("/nowhere/python"))
    async with await EngineProcess.start(command) as process:
        with pytest.raises(EngineUnavailable, match="status 127") as raised:
            await process.wait_ready(never, DEADLINE_S)
    assert "cannot start /nowhere/python" in str(raised.value.details["log"])


async def test_guard_without_an_interpreter(
    engine: Callable[[str], EngineCommand], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a guard there is no engine, and the reason is told."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineUnavailable, match="could not be started") as raised:
        await EngineProcess.start(engine(ALONE))
    assert "cannot start the guard" in str(raised.value.details["log"])


async def test_engine_keeps_the_slot_that_it_inherits(
    engine: Callable[[str], EngineCommand], tmp_path: Path, spare_port: int
) -> None:
    """A slot is free when the engine is gone, not when its worker lets go of it."""

    async def acquire(timeout_s: float) -> Slot:
        return await acquire_slot([0], tmp_path, base_port=spare_port, timeout_s=timeout_s)

    command = engine("import signal; signal.pause()")
    with await acquire(0) as slot:
        process = await EngineProcess.start(replace(command, inherit_fds=(slot.fd,)))
    with pytest.raises(EngineUnavailable, match="still held"):
        await acquire(0.2)
    waiting = asyncio.create_task(acquire(DEADLINE_S))
    await process.stop()
    (await waiting).release()


@pytest.mark.real_engine
async def test_real_comfyui(engine_install: Any, tmp_path: Path, spare_port: int) -> None:
    """A real ComfyUI starts without complaint, answers, and leaves neither process nor port."""
    command = EngineCommand(
        python=engine_install.python,
        app_dir=engine_install.app_dir,
        base_dir=tmp_path,
        models_dir=engine_install.models_dir,
        port=spare_port,
        variant="cpu",
        environ=os.environ,
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
    assert await process.exited() == ExitInfo(-signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    assert port_is_free(spare_port)
    assert "Failed to initialize database" not in (tmp_path / "engine.log").read_text()
