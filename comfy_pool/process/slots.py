"""Assign GPUs to engines and lease their ports.

A slot is a port of this node, leased by flock on a node-local file. The engine's process tree
inherits the file descriptor, so the lease lasts until owner, guard and engine have all ended. A
leaked engine keeps its slot, and a restarted worker never gets a port that is still in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Self

from restoration.errors import EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_SLOTS = 64
_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Slot:
    """A leased port, released on leaving the context.

    If `cuda_visible_devices` is None, the engine keeps the value of the worker's environment.
    """

    index: int
    port: int
    cuda_visible_devices: str | None
    lease: IO[bytes]

    @property
    def fd(self) -> int:
        """The lease's file descriptor, for the engine to inherit."""
        return self.lease.fileno()

    def release(self) -> None:
        """Close this process's descriptor. The slot is free once the engine's tree has ended."""
        self.lease.close()  # not LOCK_UN, which would release the engine's inherited lease as well

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


async def acquire_slot(
    gpu_ids: Sequence[int | str],
    lock_dir: Path,
    *,
    whole_gpu: bool = True,
    base_port: int = 8188,
    max_slots: int = MAX_SLOTS,
    timeout_s: float = 30.0,
) -> Slot:
    """Lease a slot for a worker with these `gpu_ids`, as Ray's get_gpu_ids returns them.

    A worker with a whole, numbered GPU gets the slot of that number, and waits up to `timeout_s`
    until its predecessor has released it. Any other worker (no GPU, a UUID, or a fraction, whose
    number is shared) gets the first free slot. Do not mix both kinds on one node. Raises
    EngineUnavailable if the slot is not released in time, or if no slot is free.
    """
    await asyncio.to_thread(lock_dir.mkdir, parents=True, exist_ok=True)
    devices = ",".join(str(gpu_id) for gpu_id in gpu_ids) or None
    number = physical_index(gpu_ids) if whole_gpu else None
    if number is None:
        for index in range(max_slots):
            if lease := _try_lease(lock_dir, base_port + index):
                return Slot(index, base_port + index, devices, lease)
        raise EngineUnavailable(f"all {max_slots} engine slots of this node are in use")
    port = base_port + number
    try:
        async with asyncio.timeout(timeout_s):
            while not (lease := _try_lease(lock_dir, port)):  # noqa: ASYNC110 # no event signals it
                await asyncio.sleep(_RETRY_S)
    except TimeoutError:
        raise EngineUnavailable(
            f"port {port} is still in use after {timeout_s:g} s, by the previous engine or "
            "another program",
            port=port,
        ) from None
    return Slot(number, port, devices, lease)


def physical_index(gpu_ids: Sequence[int | str]) -> int | None:
    """Return the first GPU's number on its node; None without a GPU or if its id is a UUID."""
    first = str(gpu_ids[0]) if gpu_ids else ""
    return int(first) if first.isdecimal() else None


def lease_file(lock_dir: Path, port: int) -> Path:
    """Return the path of the file whose lock is the lease of this port."""
    return lock_dir / f"engine-{port}.lock"


def port_is_free(port: int) -> bool:
    """Return whether this port of 127.0.0.1 can be listened on now."""
    with socket.socket() as probe:
        # As the engine's server does: ignore connections in TIME_WAIT, but not a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
        return True


def _try_lease(lock_dir: Path, port: int) -> IO[bytes] | None:
    """Return the lease of this port, or None if it is held or another program listens there."""
    with contextlib.ExitStack() as undo:
        # Never unlink the file: two processes could then lock two files of the same name.
        lease = undo.enter_context(lease_file(lock_dir, port).open("ab"))
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if port_is_free(port):
                undo.pop_all()
                return lease
    return None
