"""Estimates when a worker's engine will be free, from the jobs in it and from recent durations."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from restoration.workers import Stage

_REMEMBERED = 8  # durations of each kind
_MARGIN_S = 0.05
_FIRST_LEAD_S = 0.5  # used until the time to make a job ready has been measured


class EngineSchedule:
    """The jobs in the engine, at most `places`."""

    def __init__(self, places: int) -> None:
        self.places = asyncio.Semaphore(places)
        self.changed = asyncio.Event()
        self.claimed: list[EngineOccupancy] = []
        self.to_stage_s = _durations()
        self.per_pixel_s: dict[str, deque[float]] = defaultdict(_durations)  # by workflow

    @property
    def empty(self) -> bool:
        """Return whether no claimed job is in the engine or on its way to it."""
        return not self.claimed

    @asynccontextmanager
    async def occupancy(self) -> AsyncIterator[EngineOccupancy]:
        """Wait for a place. The job gives it up when it has left the engine, or at the end."""
        await self.places.acquire()
        occupancy = EngineOccupancy(self)
        try:
            yield occupancy
        finally:
            occupancy.leave()

    async def nearly_free(self) -> None:
        """Return when a job claimed now will be ready just before the engine can execute it."""
        while True:
            lead_s = 2 * max(self.to_stage_s) + _MARGIN_S if self.to_stage_s else _FIRST_LEAD_S
            wait_s = sum(each.remaining_s() for each in self.claimed) - lead_s
            if wait_s <= 0:
                return
            self.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s if math.isfinite(wait_s) else None):
                    await self.changed.wait()


class EngineOccupancy:
    """One job's stay in the engine, from its claim until its result has been read."""

    def __init__(self, schedule: EngineSchedule) -> None:
        self._schedule = schedule
        self._inside = True
        self._workflow = ""
        self._pixels = 0
        self._claimed_at = 0.0
        self._began_at: float | None = None

    def claimed(self, workflow: str) -> None:
        self._workflow = workflow
        self._claimed_at = time.monotonic()
        self._schedule.claimed.append(self)

    def staged(self, pixels: int) -> None:
        """Record that the engine has the job's picture, of `pixels` pixels, in its queue."""
        self._pixels = pixels
        self._schedule.to_stage_s.append(time.monotonic() - self._claimed_at)
        self._schedule.changed.set()

    def began(self) -> None:
        """Record that the engine has begun to execute the job."""
        self._began_at = time.monotonic()
        self._schedule.changed.set()

    def finished(self) -> None:
        """Record that the engine has finished the job, and that its result has been read."""
        if self._inside and self._began_at is not None:
            took_s = time.monotonic() - self._began_at
            self._schedule.per_pixel_s[self._workflow].append(took_s / self._pixels)
        self.leave()

    def leave(self) -> None:
        """Give up the place, however the job ended. Idempotent."""
        if not self._inside:
            return
        self._inside = False
        if self in self._schedule.claimed:
            self._schedule.claimed.remove(self)
        self._schedule.changed.set()
        self._schedule.places.release()

    @property
    def stage(self) -> Stage:
        if not self._inside:
            return Stage.STORING
        if self._began_at is not None:
            return Stage.EXECUTING
        return Stage.STAGED if self._pixels else Stage.FETCHING

    def remaining_s(self) -> float:
        """Return a lower bound in seconds, from the fastest of the workflow's recent runs.

        Infinite while the picture's size or the workflow's speed is unknown.
        """
        known = self._schedule.per_pixel_s[self._workflow]
        if not self._pixels or not known:
            return math.inf
        done_s = 0.0 if self._began_at is None else time.monotonic() - self._began_at
        return max(0.0, min(known) * self._pixels - done_s)


def _durations() -> deque[float]:
    return deque(maxlen=_REMEMBERED)
