"""The pool follows the jobs in Postgres: what the leading dispatcher does about its size.

Serve's own policies see tickets only, and from zero replicas no policy is asked: a single ticket
starts as many as the `upscaling_factor` says (decision 16 in docs/decisions). So the
leader sets the number itself, and Serve's policy keeps to it. Plain async code, no Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from restoration.errors import DependencyUnavailable
from restoration.ports import JobStore
from restoration.scaling import Scaler

log = structlog.get_logger(__name__)

SCALE_S = 1.0


class Pool(Protocol):
    """Those who can tell and set how many workers there are to be.

    Both raise DependencyUnavailable if nobody answers.
    """

    async def size(self) -> int:
        """The number that was set last, whether or not that many run already."""

    async def resize(self, workers: int) -> None: ...


class PoolScaler:
    """Looks at the demand each second, and sets the pool's size when it is time to."""

    def __init__(
        self,
        jobs: JobStore,
        pool: Pool,
        scaler: Scaler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._pool = pool
        self._scaler = scaler
        self._clock = clock

    async def run(self, pause_s: float = SCALE_S) -> None:
        """Go on until cancelled; what cannot be asked now is asked again."""
        while True:
            try:
                await self.look()
            except DependencyUnavailable as error:
                log.warning("demand_unknown", reason=error.message)
            except Exception:  # the scaler's supervisor: a defect must not freeze the pool
                log.exception("scaling_broke")
            await asyncio.sleep(pause_s)

    async def look(self) -> None:
        demand = await self._jobs.demand()
        current = await self._pool.size()
        wanted = self._scaler.decide(demand, current, self._clock())
        if wanted != current:
            log.info("pool_resized", before=current, workers=wanted, demand=demand)
            await self._pool.resize(wanted)


def keep_target(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy for the pool: whatever number was set stays.

    Serve carries it into the controller by value, so it stands on nothing of ours.
    """
    return context.target_num_replicas, {}
