"""The processes of one stack, told from all others by what the kernel knows about them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

WAIT_S = 300.0  # much longer than anything takes on a machine with other work
GPU_WORKER = "ray::ServeReplica:comfy-restore:GpuWorker"


@dataclass(frozen=True)
class Process:
    """One life of one pid: `born` is in clock ticks since boot."""

    pid: int
    born: int
    parent: int = field(compare=False)
    command: str = field(compare=False)  # Ray rewrites it with every call

    @property
    def words(self) -> list[str]:
        return self.command.split("\0")

    def is_alive(self) -> bool:
        now = _read(self.pid)
        return now is not None and now.born == self.born

    def kill(self) -> None:
        assert self.is_alive()
        os.kill(self.pid, signal.SIGKILL)

    def has_open(self, name: str) -> bool:
        """Whether it has a file of this name open."""
        try:
            return any(link.readlink().name == name for link in _fds(self.pid))
        except OSError:
            return False


def of_stack(state_dir: Path, up_pid: int | None = None) -> list[Process]:
    """Everything that names the folder on its command line or in its environment, and all below
    `up_pid`: a title that Ray gives a process may take the place of both."""
    found = {each.pid: each for each in _all() if _names(each, str(state_dir))}
    if up_pid is not None:
        found |= {each.pid: each for each in _below(up_pid)}
    return list(found.values())


def engines(state_dir: Path) -> dict[int, Process]:
    """The ComfyUI of each port."""
    found = {}
    for each in _all():
        words = each.words
        if "--base-directory" in words and "guard.py" not in each.command:
            folder = Path(words[words.index("--base-directory") + 1])
            if folder.is_relative_to(state_dir):
                found[int(folder.name)] = each
    return found


def workers(state_dir: Path) -> dict[int, Process]:
    """The GPU worker of each engine's port: the one that holds its lease."""
    ours = [each for each in of_stack(state_dir) if each.command.startswith(GPU_WORKER)]
    return {
        port: worker
        for port in engines(state_dir)
        for worker in ours
        if worker.has_open(f"engine-{port}.lock")
    }


def wait_until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.1)


def _all() -> Iterator[Process]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := _read(int(entry))) is not None:
            yield process


def _read(pid: int) -> Process | None:
    """None for what has ended, be it still to be reaped."""
    folder = Path(f"/proc/{pid}")
    try:
        # "pid (name) state ppid ...", where the name may hold anything
        stat = (folder / "stat").read_text().rpartition(")")[2].split()
        command = (folder / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    if stat[0] in "ZX":
        return None
    return Process(pid, int(stat[19]), int(stat[1]), command)


def _below(pid: int) -> list[Process]:
    processes = list(_all())
    found = [each for each in processes if each.pid == pid]
    for parent in found:
        found += [each for each in processes if each.parent == parent.pid]
    return found


def _names(process: Process, folder: str) -> bool:
    try:
        environ = Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return folder in process.command or f"COMFY_RESTORE_STATE={folder}" in environ.split("\0")


def _fds(pid: int) -> Iterator[Path]:
    return Path(f"/proc/{pid}/fd").iterdir()
