"""Poll for conditions that send no event, such as a row in Postgres or the end of a process."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable

DEADLINE_S = 300.0  # far longer than anything takes on a busy machine


async def until(condition: Callable[[], object], timeout_s: float = DEADLINE_S) -> None:
    """Return when `condition()` is true, or what it returns to await is.

    Raises TimeoutError after `timeout_s`.
    """
    async with asyncio.timeout(timeout_s):
        while True:
            holds = condition()
            if await holds if inspect.isawaitable(holds) else holds:
                return
            await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], object], timeout_s: float = DEADLINE_S) -> None:
    """As `until`, in a thread that may block."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s")
        time.sleep(0.1)
