"""Which GPU an engine uses, and which port on this node is its alone.

A slot is a port, leased by flock on a node-local file. The engine's tree inherits the descriptor,
so the lease lasts until the last of owner, guard and engine is gone: an engine that was leaked
keeps its slot, and a restarted worker never meets its predecessor's port.
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
    """A leased port. `cuda_visible_devices` is None when the environment's own is to stand."""

    index: int
    port: int
    cuda_visible_devices: str | None
    lease: IO[bytes]

    @property
    def fd(self) -> int:
        """The lease's descriptor, for the engine to inherit."""
        return self.lease.fileno()

    def release(self) -> None:
        """Give up this process's hold; the slot is free once no engine holds it either."""
        self.lease.close()  # never LOCK_UN, which would take the lease from the engine as well

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
    """Lease the slot of a worker that was given `gpu_ids` (as Ray's get_gpu_ids: int, str, UUID).

    A whole GPU with a number has the slot of that number, and waits for a predecessor to leave
    it. Otherwise (no GPU, a UUID, or a fraction, whose number others share) the first free slot
    is taken; let both kinds of worker not share a node. Raises EngineUnavailable if the slot is
    still held after `timeout_s`, or all are.
    """
    await asyncio.to_thread(lock_dir.mkdir, parents=True, exist_ok=True)
    devices = ",".join(str(gpu_id) for gpu_id in gpu_ids) or None
    number = physical_index(gpu_ids) if whole_gpu else None
    if number is None:
        for index in range(max_slots):
            if lease := _try_lease(lock_dir, base_port + index):
                return Slot(index, base_port + index, devices, lease)
        raise EngineUnavailable(f"none of this node's {max_slots} engine slots is free")
    lease = await _wait_for_lease(lock_dir, base_port + number, timeout_s)
    return Slot(number, base_port + number, devices, lease)


def physical_index(gpu_ids: Sequence[int | str]) -> int | None:
    """The number of the first GPU on its node; None without a GPU, or if it has a UUID only."""
    first = str(gpu_ids[0]) if gpu_ids else ""
    return int(first) if first.isdecimal() else None


def lease_file(lock_dir: Path, port: int) -> Path:
    """The file whose lock is the lease of this port."""
    return lock_dir / f"engine-{port}.lock"


def port_is_free(port: int) -> bool:
    """Whether an engine could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        # as the engine's server does: connections in TIME_WAIT are no obstacle, a listener is
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
        return True


def _try_lease(lock_dir: Path, port: int) -> IO[bytes] | None:
    """The lease of this port, or None while somebody holds it or listens there."""
    with contextlib.ExitStack() as undo:
        # The file stays for good: two processes could lock two files of one unlinked name.
        lease = undo.enter_context(lease_file(lock_dir, port).open("ab"))
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if port_is_free(port):
                undo.pop_all()
                return lease
    return None


async def _wait_for_lease(lock_dir: Path, port: int, timeout_s: float) -> IO[bytes]:
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                if lease := _try_lease(lock_dir, port):
                    return lease
                await asyncio.sleep(_RETRY_S)  # neither a lock nor a port announces its release
    except TimeoutError:
        raise EngineUnavailable(
            f"port {port} is still held after {timeout_s:g} s: by the engine before, or a stranger",
            port=port,
        ) from None
