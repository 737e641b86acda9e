"""Measure the memory of a process tree."""

from __future__ import annotations

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
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return page_bytes * sum(map(_resident_pages, [pid, *descendants(pid)]))


def _resident_pages(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # the process has ended
        return 0
