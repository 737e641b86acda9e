"""How much memory a process tree holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from comfy_pool.process.guard import descendants


def resident_bytes(pid: int) -> int:
    """The resident memory of `pid` and all below it, from Linux's /proc; elsewhere 0.

    Pages that they share are counted for each: ComfyUI is one process, its helpers are small.
    """
    if sys.platform != "linux":
        return 0
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return page_bytes * sum(map(_resident_pages, [pid, *descendants(pid)]))


def _resident_pages(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # it ended meanwhile
        return 0
