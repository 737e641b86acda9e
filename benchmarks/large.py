"""Measure the peak memory of each process that a result of 100 megapixels passes.

The peak is that of Linux (VmHWM) since just before the job. Pages in shared memory, where the
engine leaves the pixels for the encoder, count for both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.figures import Bench, Figure, Goal
from benchmarks.service_client import Held, ServiceClient
from restoration.jobs import OutputFormat
from serve_app.local.temporary import LocalStack

_STATE = "COMFY_RESTORE_STATE"
LARGE = Held(10_000, 0.0, jobs=1)
FORMATS = (OutputFormat.PNG, OutputFormat.JPEG)
# Mark in the command line, and memory limit in MB for 100 million pixels
PARTS: Mapping[str, tuple[str, int]] = {
    "ingress": ("ray::ServeReplica:comfy-restore:Ingress", 400),
    "worker": ("ray::ServeReplica:comfy-restore:GpuWorker", 500),
    "image process": ("actors.images.process", 900),
    "engine": ("app/main.py --", 6000),
}


def large_pictures(bench: Bench) -> Sequence[Figure]:
    """Run one job for each format, enlarging a real photo, with no other job at the time."""
    return asyncio.run(_measure(bench))


async def _measure(bench: Bench) -> list[Figure]:
    peaks: dict[str, list[float]] = {part: [] for part in PARTS}
    async with ServiceClient.to(bench.stack) as client:
        for output_format in FORMATS:
            for process in _processes(bench.stack):
                _forget_peak(process)
            await client.restore(LARGE, LARGE.photo(), output_format)
            now = _peaks_mb(_processes(bench.stack))
            for part, (mark, _) in PARTS.items():
                peaks[part].append(max(mb for command, mb in now if mark in command))
            told = ", ".join(f"{part} {values[-1]:.0f}" for part, values in peaks.items())
            bench.say(f"  {output_format}, MB: {told}")
    return [
        Figure(
            f"peak memory at 100 megapixels, {part}",
            peaks[part],
            Goal(most_mb, at_least=False),
            "MB",
        )
        for part, (_, most_mb) in PARTS.items()
    ]


def _processes(stack: LocalStack) -> list[psutil.Process]:
    """Return the processes with the stack's folder in environment or command, and their
    children."""
    state = str(stack.state_dir)
    found = {
        each
        for each in psutil.process_iter()
        if _environment(each).get(_STATE) == state or state in _command(each)
    }
    return [*found.union(*(_children(each) for each in found))]


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:  # of another user, or ended meanwhile
        return {}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # ended meanwhile
        return ""


def _forget_peak(process: psutil.Process) -> None:
    """Reset the process's VmHWM, see proc(5)."""
    with suppress(OSError):  # ended meanwhile
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def _peaks_mb(processes: Iterable[psutil.Process]) -> list[tuple[str, float]]:
    """Return the command and the peak memory in MB of each process."""
    peaks = []
    for process in processes:
        with suppress(OSError, ValueError):  # ended meanwhile
            status = Path(f"/proc/{process.pid}/status").read_text()
            [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
            peaks.append((_command(process), int(line.split()[1]) * 1024 / 1e6))
    return peaks
