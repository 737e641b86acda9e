"""Measure the memory of a process tree."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from restoration.processes.guard import descendants


def resident_bytes(pid: int) -> int:
    """Return the resident memory of `pid` and its descendants from /proc; 0 if not on Linux.

    Shared pages count once for each process, which matters little: ComfyUI is one process, and its
    children are small.
    """
    if sys.platform != "linux":
        return 0
    pages = 0
    for each in (pid, *descendants(pid)):
        with contextlib.suppress(OSError):  # the process has ended
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
