"""Small scripts that replace ComfyUI in tests about processes rather than pictures.

Every process of a tree holds the write end of a pipe, the witness. Processes write words to it, and
end of file proves that the whole tree is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from comfy_pool.process.process import EngineCommand

DEADLINE_S = 300

SPEAK = """
import os, signal, sys
def say(word):
    os.write(int(os.environ["WITNESS"]), f"{word} {os.getpid()} {os.getppid()}\\n".encode())
"""
ALONE = SPEAK + 'say("engine"); signal.pause()\n'
WITH_CHILD = (
    SPEAK + 'if os.fork() == 0: say("child"); signal.pause()\nsay("engine"); signal.pause()'
)

# A daemon leaves the engine's process group and session, and loses its parent.
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
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"

# As in Ray, a raylet starts the worker that owns the engine.
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
from comfy_pool.process.process import EngineCommand, EngineProcess

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
        """Close this process's write end, so that end of file depends only on the others."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def wait_for(self, *words: str) -> dict[str, tuple[int, int]]:
        """Block until each word was written; return the pid and parent pid of its writer."""
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


@contextlib.contextmanager
def witnessing() -> Iterator[Witness]:
    witness = Witness()
    yield witness
    witness.release()
    os.close(witness.reader)


def stand_ins(folder: Path, witness: Witness) -> Callable[[str], EngineCommand]:
    """Return a function that builds the command of a fake engine from its main.py."""

    def build(script: str) -> EngineCommand:
        for name in ("app", "models"):
            (folder / name).mkdir()
        (folder / "app" / "main.py").write_text(script)
        return EngineCommand(
            python=Path(sys.executable),
            app_dir=folder / "app",
            base_dir=folder / "base",
            models_dir=folder / "models",
            port=1,
            variant="cpu",
            environ={**os.environ, "WITNESS": str(witness.writer)},
            inherit_fds=(witness.writer,),
        )

    return build


@contextlib.contextmanager
def cluster(command: EngineCommand, folder: Path) -> Iterator[tuple[int, int]]:
    """Start a raylet whose worker starts the engine; yield the pids of both."""
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
