"""Find the processes of each part of one local stack.

A process belongs to the stack if it descends from the one that holds the state folder, or if it is
a ComfyUI whose base directory lies in that folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from persistence.embedded.state import holder_of
from tests.support.stack_processes import GPU_WORKER, Process, engines, tree


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
    Part.GPU_WORKER: GPU_WORKER,
    Part.DISPATCHER: "ray::ServeReplica:comfy-restore:Dispatcher",
    Part.INGRESS: "ray::ServeReplica:comfy-restore:Ingress",
    Part.MAINTENANCE: "ray::ServeReplica:comfy-restore:Maintenance",
    Part.CONTROLLER: "ray::ServeController",
    Part.PROXY: "ray::ProxyActor",
    Part.STATUS_ACTOR: "ray::StatusActor",
}
_IMAGE_PROCESS = "actors.images.process"
_SERVERS = {Part.POSTGRES: "postgres", Part.VALKEY: "valkey-server", Part.SEAWEEDFS: "weed"}


class StackProcesses:
    """The processes of the stack in `state_dir`, read again at each call."""

    def __init__(self, state_dir: Path, lease_s: float = 4.0) -> None:
        self.state_dir = state_dir
        self.lease_s = lease_s

    def find(self, part: Part) -> list[Process]:
        """Return the processes of a part by pid; none while the part is restarting."""
        if part is Part.COMFYUI:
            return list(engines(self.state_dir).values())
        root = holder_of(self.state_dir)
        below = {each.pid: each for each in tree(root)} if root else {}
        return [below[pid] for pid in sorted(below) if _is(part, below[pid], below, root)]

    def engine_of(self, worker: Process) -> tuple[int, Process] | None:
        """Return the ComfyUI whose slot `worker` has leased, with its port."""
        leased = (pair for pair in engines(self.state_dir).items() if _leases(worker, pair[0]))
        return next(leased, None)

    def leaked_engines(self) -> list[Process]:
        """Return the engines whose slot no living worker has leased."""
        workers = self.find(Part.GPU_WORKER)
        return [
            engine
            for port, engine in engines(self.state_dir).items()
            if not any(_leases(worker, port) for worker in workers)
        ]

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


def _is(part: Part, process: Process, below: Mapping[int, Process], root: int | None) -> bool:
    if part in _ACTORS:
        return process.command.startswith(_ACTORS[part])
    if part is Part.IMAGE_PROCESS:  # only a worker's: an ingress has image processes too
        owner = below.get(process.parent)
        is_workers = owner is not None and owner.command.startswith(_ACTORS[Part.GPU_WORKER])
        return is_workers and _IMAGE_PROCESS in process.command
    program = Path(process.words[0].split(" ", 1)[0]).name  # some servers set a title with spaces
    guard = below.get(process.parent)
    return program == _SERVERS[part] and guard is not None and guard.parent == root


def _leases(worker: Process, port: int) -> bool:
    return worker.has_open(f"engine-{port}.lock")
