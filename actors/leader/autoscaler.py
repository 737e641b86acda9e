"""Scales the worker pool with the jobs in Postgres, in the leading dispatcher. No Ray.

Serve's own policies see only tickets, and at zero replicas Serve asks no policy: a single ticket
starts as many replicas as the `upscaling_factor` says (decision 16 in docs/decisions). So the
leader sets the target itself, and Serve's policy (`keep_target`) leaves it unchanged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from restoration.errors import DependencyUnavailable
from restoration.ports.jobs import LeaderQueue
from restoration.scaling import Scaler

log = structlog.get_logger(__name__)

SCALE_S = 1.0


class Pool(Protocol):
    """Reads and sets the target number of workers. Both methods raise DependencyUnavailable."""

    async def size(self) -> int:
        """Return the current target, which may differ from the number of running workers."""

    async def resize(self, workers: int) -> None: ...


class PoolScaler:
    """Resizes the pool to the demand in Postgres, as `scaler` decides."""

    def __init__(
        self,
        jobs: LeaderQueue,
        pool: Pool,
        scaler: Scaler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._pool = pool
        self._scaler = scaler
        self._clock = clock

    async def run(self, pause_s: float = SCALE_S) -> None:
        """Update the size every `pause_s` seconds until cancelled. Failures are logged."""
        while True:
            try:
                await self.look()
            except DependencyUnavailable as error:
                log.warning("demand_unknown", reason=error.message)
            except Exception:  # a bug must not stop the scaling for good
                log.exception("scaling_broke")
            await asyncio.sleep(pause_s)

    async def look(self) -> None:
        """Read the demand once, and resize the pool if needed. Raises DependencyUnavailable."""
        demand = await self._jobs.demand()
        current = await self._pool.size()
        wanted = self._scaler.decide(demand, current, self._clock())
        if wanted != current:
            log.info("pool_resized", before=current, workers=wanted, demand=demand)
            await self._pool.resize(wanted)


def keep_target(context: Any) -> tuple[int, dict[str, Any]]:
    """Autoscaling policy for Serve: keep the current target.

    Serve pickles the function into its controller by value, so it must not use this package.
    """
    return context.target_num_replicas, {}
