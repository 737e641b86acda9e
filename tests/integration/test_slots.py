"""Slots between real processes and on real ports."""

from __future__ import annotations

import asyncio
import secrets
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from comfy_pool.doctor.ports import examine_ports
from comfy_pool.process.slots import Slot, acquire_slot, port_is_free
from restoration.errors import EngineUnavailable

if TYPE_CHECKING:
    from pathlib import Path

PORTS = 4
DEADLINE_S = 300

HOLDER = """
import asyncio, sys
from pathlib import Path
from comfy_pool.process.slots import acquire_slot

slot = asyncio.run(acquire_slot([], Path(sys.argv[1]), base_port=int(sys.argv[2])))
print(slot.index, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def base_port() -> int:
    """Return the first of several consecutive free ports."""
    while True:
        base = 10_000 + secrets.randbelow(10_000)
        if all(port_is_free(base + index) for index in range(PORTS)):
            return base


def listen(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


async def test_numbered_gpu_has_its_own_port(tmp_path: Path, base_port: int) -> None:
    """GPU 2 has slot 2, whether or not lower slots are free."""
    with await acquire_slot(["2"], tmp_path, base_port=base_port) as slot:
        assert (slot.index, slot.port, slot.cuda_visible_devices) == (2, base_port + 2, "2")


@pytest.mark.parametrize(
    ("gpu_ids", "whole_gpu", "devices"),
    [([], True, None), (["GPU-5b1f"], True, "GPU-5b1f"), ([2], False, "2")],
)
async def test_others_take_the_first_free_slot(
    gpu_ids: list[int | str], whole_gpu: bool, devices: str | None, tmp_path: Path, base_port: int
) -> None:
    """Without a numbered GPU a worker skips leased slots and ports in use."""
    with ExitStack() as stack:

        async def acquire() -> Slot:
            return stack.enter_context(
                await acquire_slot(
                    gpu_ids, tmp_path / "locks", whole_gpu=whole_gpu, base_port=base_port
                )
            )

        stack.enter_context(listen(base_port + 1))
        first, second = await acquire(), await acquire()
        assert [first.index, second.index] == [0, 2]
        assert first.cuda_visible_devices == devices
        first.release()
        assert (await acquire()).index == 0


async def test_processes_that_ask_at_once_get_different_slots(
    tmp_path: Path, base_port: int
) -> None:
    """A lease holds across processes, and ends with its process."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path), str(base_port)]

    def check() -> None:
        with ExitStack() as stack:
            holders = [
                stack.enter_context(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                )
                for _ in range(PORTS)
            ]
            slots = [int(holder.stdout.readline()) for holder in holders if holder.stdout]
            assert len(set(slots)) == PORTS
            for holder in holders:
                holder.kill()

    await asyncio.to_thread(check)
    with await acquire_slot([], tmp_path, base_port=base_port) as slot:
        assert slot.index == 0


async def test_all_slots_taken(tmp_path: Path, base_port: int) -> None:
    """Without a free slot the error is retryable."""
    with await acquire_slot([], tmp_path, base_port=base_port, max_slots=1):
        with pytest.raises(EngineUnavailable, match="all 1 engine slots") as raised:
            await acquire_slot([], tmp_path, base_port=base_port, max_slots=1)
    assert raised.value.retryable


async def test_numbered_gpu_waits_for_its_predecessor(tmp_path: Path, base_port: int) -> None:
    """A restarted worker waits until its lease and its port are free."""
    predecessor = await acquire_slot([1], tmp_path, base_port=base_port)
    with listen(predecessor.port):
        waiting = asyncio.create_task(
            acquire_slot([1], tmp_path, base_port=base_port, timeout_s=DEADLINE_S)
        )
        await asyncio.sleep(0)
        predecessor.release()
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done
    with await waiting as slot:
        assert slot.index == 1


@pytest.mark.parametrize("obstacle", ["lease", "port"])
async def test_numbered_gpu_gives_up_in_time(obstacle: str, tmp_path: Path, base_port: int) -> None:
    """A predecessor that stays is an error that names the port."""
    with ExitStack() as stack:
        if obstacle == "lease":
            stack.enter_context(await acquire_slot([1], tmp_path, base_port=base_port))
        else:
            stack.enter_context(listen(base_port + 1))
        with pytest.raises(EngineUnavailable, match=f"port {base_port + 1} is still in use"):
            await acquire_slot([1], tmp_path, base_port=base_port, timeout_s=0.2)


async def test_lease_can_be_released_twice(tmp_path: Path, base_port: int) -> None:
    """A second release does nothing, and closes no other descriptor."""
    slot = await acquire_slot([0], tmp_path, base_port=base_port)
    slot.release()
    with await acquire_slot([0], tmp_path, base_port=base_port, timeout_s=0) as next_slot:
        slot.release()
        assert next_slot.fd >= 0


async def test_connections_that_linger_hold_no_port(tmp_path: Path, base_port: int) -> None:
    """A predecessor's connections in TIME_WAIT do not block the port."""
    with listen(base_port) as server, socket.create_connection(server.getsockname()):
        connection, _ = server.accept()
        connection.close()  # The server closes first, so that its side stays in TIME_WAIT.
    with await acquire_slot([0], tmp_path, base_port=base_port, timeout_s=0) as slot:
        assert slot.port == base_port


@pytest.mark.fleet
async def test_doctor_tells_whose_port_is_taken_by_whom(tmp_path: Path, base_port: int) -> None:
    """Of four GPUs one has its engine, and one has another program on its port: only taken ports
    are reported, with a remedy. A released lease does not count as an engine's."""
    with await acquire_slot([3], tmp_path, base_port=base_port):
        pass
    with await acquire_slot([1], tmp_path, base_port=base_port) as slot, listen(slot.port):
        with listen(base_port + 2), listen(base_port + 3):
            found = examine_ports(tmp_path, base_port, gpus=PORTS)
    assert [(each.name, each.ok) for each in found] == [
        (f"port {base_port + index}", index < 2) for index in range(PORTS)
    ]
    assert "free" in found[0].detail
    assert "in use by the engine of GPU 1" in found[1].detail
    assert f":{base_port + 2}" in found[2].remedy
    assert "GPU 2" in found[2].detail


@pytest.mark.fleet
async def test_doctor_names_the_port_of_the_next_engine(tmp_path: Path, base_port: int) -> None:
    """Without numbered GPUs taken ports are skipped, and those of other programs are named."""
    with await acquire_slot([], tmp_path, base_port=base_port) as slot, listen(slot.port):
        [next_one] = examine_ports(tmp_path, base_port, gpus=0)
        with listen(base_port + 1):
            [after_a_stranger] = examine_ports(tmp_path, base_port, gpus=0)
    assert (next_one.ok, next_one.detail) == (True, f"{base_port + 1} is free for the next engine")
    assert after_a_stranger.ok
    assert after_a_stranger.detail.startswith(f"{base_port + 2} is free")
    assert f"skipped, in use by other programs: {base_port + 1}" in after_a_stranger.detail


@pytest.mark.fleet
def test_doctor_looks_at_ports_and_takes_none(tmp_path: Path, base_port: int) -> None:
    """No file is created on a machine that never had an engine."""
    with listen(base_port):
        examine_ports(tmp_path / "slots", base_port, gpus=2)
    assert list(tmp_path.iterdir()) == []
