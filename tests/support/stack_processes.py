"""The processes of one stack, identified by the kernel's data about them, and signals to them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

GPU_WORKER = "ray::ServeReplica:comfy-restore:GpuWorker"


@dataclass(frozen=True)
class Process:
    """A process, identified by its pid and its start `born` in clock ticks since boot."""

    pid: int
    born: int
    parent: int = field(compare=False)
    command: str = field(compare=False)  # Ray rewrites it with every call.

    @property
    def words(self) -> list[str]:
        return self.command.split("\0")

    def runs(self, module: str) -> bool:
        """Return whether this is `python -m module`, and not the guard that starts that."""
        return self.words[1:3] == ["-m", module]

    def is_alive(self) -> bool:
        now = _read(self.pid)
        return now is not None and now.born == self.born

    def kill(self) -> None:
        assert self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> bool:
        """Signal this process, and never another that got its pid; return False if it has ended."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.is_alive():
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def open_files(self) -> dict[int, str]:
        """Return the target of each descriptor: a path, or for example "socket:[inode]"."""
        found = {}
        with suppress(OSError):  # it has ended
            for link in Path(f"/proc/{self.pid}/fd").iterdir():
                with suppress(OSError):  # was closed meanwhile
                    found[int(link.name)] = str(link.readlink())
        return found

    def has_open(self, name: str) -> bool:
        """Return whether the process has a file of this name open."""
        return any(Path(target).name == name for target in self.open_files().values())


def of_stack(state_dir: Path, up_pid: int | None = None) -> list[Process]:
    """Return the processes that name the folder in their command line or environment, and all
    descendants of `up_pid`, because Ray's process titles may overwrite both."""
    found = {each.pid: each for each in every_process() if _names(each, str(state_dir))}
    if up_pid is not None:
        found |= {each.pid: each for each in tree(up_pid)}
    return list(found.values())


def engines(state_dir: Path) -> dict[int, Process]:
    """Return the ComfyUI of each port."""
    found = {}
    for each in every_process():
        words = each.words
        if "--base-directory" in words and "guard.py" not in each.command:
            folder = Path(words[words.index("--base-directory") + 1])
            if folder.is_relative_to(state_dir):
                found[int(folder.name)] = each
    return found


def workers(state_dir: Path) -> dict[int, Process]:
    """Return for each engine's port the GPU worker that holds its lease."""
    ours = [each for each in of_stack(state_dir) if each.command.startswith(GPU_WORKER)]
    return {
        port: worker
        for port in engines(state_dir)
        for worker in ours
        if worker.has_open(f"engine-{port}.lock")
    }


def every_process() -> Iterator[Process]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := _read(int(entry))) is not None:
            yield process


def _read(pid: int) -> Process | None:
    """Return None for a process that has ended, even if it is not reaped yet."""
    folder = Path(f"/proc/{pid}")
    try:
        # "pid (name) state ppid ...", where the name may contain anything
        stat = (folder / "stat").read_text().rpartition(")")[2].split()
        command = (folder / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    if stat[0] in "ZX":
        return None
    return Process(pid, int(stat[19]), int(stat[1]), command)


def tree(pid: int) -> list[Process]:
    """Return the process and all its descendants."""
    processes = list(every_process())
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
