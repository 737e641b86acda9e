"""Leader election among the replicas of a deployment. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

from persistence.postgres.leadership import Leadership
from restoration.errors import DependencyUnavailable

log = structlog.get_logger(__name__)

_WAIT_S = 1.0
_RECONNECT_S = 1.0


async def lead_whenever_possible(
    run: Callable[[Leadership], Awaitable[None]], make: Callable[[], Leadership], role: str
) -> NoReturn:
    """Wait for the lead and await `run`, repeatedly.

    `run` must raise DependencyUnavailable when the lead is lost. `role` appears in the log.
    """
    while True:
        leadership = make()
        try:
            while not await leadership.acquire(_WAIT_S):
                pass
            log.info("lead_taken", role=role)
            await run(leadership)
        except DependencyUnavailable as error:
            log.warning("lead_lost", role=role, reason=error.message)
            await asyncio.sleep(_RECONNECT_S)
        finally:
            await leadership.aclose()
