"""Report which engine ports of this machine are free, leased or taken. Read-only."""

from __future__ import annotations

import fcntl
from pathlib import Path

from comfy_pool.doctor.engine import Finding
from comfy_pool.process.slots import MAX_SLOTS, lease_file, port_is_free


def examine_ports(lock_dir: Path, base_port: int, gpus: int) -> list[Finding]:
    """Return one finding for each numbered GPU, whose port is `base_port` plus its number.

    If `gpus` is 0, return one finding for the first free port, which the next engine takes.
    """
    if gpus:
        return [_of_gpu(lock_dir, base_port, number) for number in range(gpus)]
    return [_first_free(lock_dir, base_port)]


def _of_gpu(lock_dir: Path, base_port: int, number: int) -> Finding:
    port = base_port + number
    name = f"port {port}"
    if port_is_free(port):
        return Finding(name, True, f"free for the engine of GPU {number}")
    if _is_leased(lock_dir, port):
        return Finding(name, True, f"in use by the engine of GPU {number}")
    detail = f"another program listens here, so GPU {number} cannot have an engine"
    return Finding(name, False, detail, _remedy(port))


def _first_free(lock_dir: Path, base_port: int) -> Finding:
    ports = range(base_port, base_port + MAX_SLOTS)
    taken: list[int] = []
    for port in ports:
        if port_is_free(port):
            strangers = [each for each in taken if not _is_leased(lock_dir, each)]
            detail = f"{port} is free for the next engine"
            if strangers:
                detail += f"; skipped, in use by other programs: {', '.join(map(str, strangers))}"
            return Finding("ports", True, detail)
        taken.append(port)
    return Finding("ports", False, f"{ports[0]} to {ports[-1]} are all in use", _remedy(base_port))


def _is_leased(lock_dir: Path, port: int) -> bool:
    """Return whether an engine holds the lease of this busy port.

    The shared lock taken for the check is harmless: a busy port is never leased.
    """
    try:
        with lease_file(lock_dir, port).open("rb") as lease:
            fcntl.flock(lease, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _remedy(port: int) -> str:
    return f"end the program that `ss -ltnp sport = :{port}` shows, or set ENGINE_BASE_PORT"
