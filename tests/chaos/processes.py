"""Find the processes of one local stack, and signal them without ever hitting another's.

A process belongs to the stack if it descends from the one that holds the state folder, or if it is
a ComfyUI whose base directory lies in that folder. Signals go through a pidfd, after a check that
the pid has not been reused.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from persistence.embedded.state import holder_of
from restoration.processes.guard import descendants


class Part(StrEnum):
    """The parts of a stack, named as in the report."""

    GPU_WORKER = "GPU worker"
    COMFYUI = "ComfyUI"
    DISPATCHER = "dispatcher"
    INGRESS = "ingress"
    CONTROLLER = "Serve controller"
    PROXY = "Serve proxy"
    STATUS_ACTOR = "status actor"
    MAINTENANCE = "maintenance"
    IMAGE_PROCESS = "image process"
    POSTGRES = "Postgres"
    VALKEY = "Valkey"
    SEAWEEDFS = "SeaweedFS"


# Ray names its processes after their actor, and appends the running method.
_ACTORS = {
    Part.GPU_WORKER: "ray::ServeReplica:comfy-restore:GpuWorker",
    Part.DISPATCHER: "ray::ServeReplica:comfy-restore:Dispatcher",
    Part.INGRESS: "ray::ServeReplica:comfy-restore:Ingress",
    Part.MAINTENANCE: "ray::ServeReplica:comfy-restore:Maintenance",
    Part.CONTROLLER: "ray::ServeController",
    Part.PROXY: "ray::ProxyActor",
    Part.STATUS_ACTOR: "ray::StatusActor",
}
_IMAGE_PROCESS = "-m actors.images.process"
_SERVERS = {Part.POSTGRES: "postgres", Part.VALKEY: "valkey-server", Part.SEAWEEDFS: "weed"}
_LEASE = re.compile(r"engine-(\d+)\.lock$")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, identified for good by its pid and its start time `started` in kernel ticks."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        fields = _fields(pid)
        return Process(pid, int(fields[19])) if fields else None

    @property
    def alive(self) -> bool:
        fields = _fields(self.pid)
        return bool(fields) and int(fields[19]) == self.started and fields[0] != "Z"

    def tree(self) -> list[Process]:
        """Return this process and all its descendants."""
        below = [Process.of(pid) for pid in descendants(self.pid)]
        return [self, *(process for process in below if process)]

    def send(self, number: signal.Signals) -> bool:
        """Signal the process; return False if it had ended."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


class StackProcesses:
    """The processes of the stack in `state_dir`, read again at each call."""

    def __init__(self, state_dir: Path, lease_s: float = 4.0) -> None:
        self.state_dir = state_dir
        self.lease_s = lease_s

    def find(self, part: Part) -> list[Process]:
        """Return the processes of a part by pid; none while the part is restarting."""
        if part is Part.COMFYUI:
            return [engine for engine, _port in self.engines()]
        root = holder_of(self.state_dir)
        below = descendants(root) if root else []
        pids = [pid for pid in sorted(below) if self._is(part, pid, root)]
        return [process for pid in pids if (process := Process.of(pid))]

    def engines(self) -> list[tuple[Process, int]]:
        """Return every ComfyUI of this stack with its port, also those whose parent has died."""
        base_dirs = f"--base-directory {self.state_dir}/engines/"
        found = []
        for entry in Path("/proc").iterdir():
            title = _title(int(entry.name)) if entry.name.isdigit() else ""
            if base_dirs in title and "guard.py" not in title:
                port = int(title.partition(base_dirs)[2].split()[0])
                if process := Process.of(int(entry.name)):
                    found.append((process, port))
        return found

    def engine_of(self, worker: Process) -> tuple[Process, int] | None:
        """Return the ComfyUI whose slot `worker` has leased, with its port."""
        leased = _leased_ports(worker.pid)
        return next((pair for pair in self.engines() if pair[1] in leased), None)

    def leaked_engines(self) -> list[Process]:
        """Return the engines whose slot no living worker has leased."""
        owned = {
            port for worker in self.find(Part.GPU_WORKER) for port in _leased_ports(worker.pid)
        }
        return [engine for engine, port in self.engines() if port not in owned]

    def variable(self, name: str) -> str:
        """Return an environment variable of the stack's replicas.

        Raises LookupError if no worker has it.
        """
        for process in self.find(Part.GPU_WORKER):
            for item in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                key, _, value = item.decode(errors="replace").partition("=")
                if key == name:
                    return value
        raise LookupError(f"no worker has {name}")

    def _is(self, part: Part, pid: int, root: int | None) -> bool:
        title = _title(pid)
        if part in _ACTORS:
            return title.startswith(_ACTORS[part])
        fields = _fields(pid)
        if part is Part.IMAGE_PROCESS:  # only a worker's: an ingress has image processes too
            owner = _title(int(fields[1])) if fields else ""
            return _IMAGE_PROCESS in title and owner.startswith(_ACTORS[Part.GPU_WORKER])
        if Path(title.split(" ", 1)[0]).name != _SERVERS[part] or not fields:
            return False
        guard = _fields(int(fields[1]))
        return bool(guard) and int(guard[1]) == root


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat ("pid (name) state ppid ...") from `state` on.

    The list is empty if the process is gone.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _leased_ports(pid: int) -> set[int]:
    return {
        int(match[1]) for target in open_files(pid).values() if (match := _LEASE.search(target))
    }


def open_files(pid: int) -> dict[int, str]:
    """Return the target of each descriptor of a process: a path, or for example
    "socket:[inode]"."""
    return dict(_open_files(pid))


def _open_files(pid: int) -> Iterator[tuple[int, str]]:
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return
    for descriptor in descriptors:
        try:
            yield int(descriptor.name), os.readlink(descriptor)
        except OSError:  # was closed meanwhile
            continue
