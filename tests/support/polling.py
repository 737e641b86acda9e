"""Poll for conditions that send no event, such as a row in Postgres or a waiting lock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

DEADLINE_S = 300  # far longer than anything takes on a busy machine


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Return when `condition` holds. Raises TimeoutError after DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 # Postgres tells nobody
            await asyncio.sleep(0.02)
