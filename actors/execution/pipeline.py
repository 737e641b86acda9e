"""A worker's stages: while one job executes, the next is fetched and the previous one is stored.

A job is claimed late, just in time to be ready when the engine finishes the work ahead of it. Until
then an idle worker may claim it, and a more urgent job may overtake it. Plain async code, no Ray.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from actors.execution.attempt import EngineOccupancy
from restoration.jobs import Job
from restoration.workers import Stage

# Outcomes of a ticket without a job: no job could be claimed; the worker could not claim soon.
NOTHING_WAITS = "nothing waits"
BUSY = "busy"

# Jobs that may be encoded and stored at a time: one for each image process that encodes.
STORING = 2
_REMEMBERED = 8  # durations of each kind
_MARGIN_S = 0.05
# A ticket that has already run a job may wait longer, because no other worker needs it.
_SERVED_HOLD_S = 5.0
_FIRST_LEAD_S = 0.5  # used until the time to make a job ready has been measured

Claim = Callable[[], Awaitable[Job | None]]
Run = Callable[[Job, EngineOccupancy], Awaitable[str]]


async def one_after_another(
    process: Callable[[float], Awaitable[str]], hold_s: float, more_wait: Callable[[], bool]
) -> str:
    """Run jobs on one ticket while more wait, because a ticket costs more than a claim.

    Return the last job's outcome, or the ticket's if it ran no job.
    """
    served = outcome = await process(hold_s)
    while outcome not in {NOTHING_WAITS, BUSY} and more_wait():
        served, outcome = outcome, await process(_SERVED_HOLD_S)
    return served


def stages(depth: int) -> int:
    """Return the number of tickets a worker uses at a time, for its `max_ongoing_requests`."""
    return 1 + depth + STORING


class Pipeline:
    """Claims and runs jobs, with up to `depth` made ready behind the one that executes."""

    def __init__(self, claim: Claim, run: Run, depth: int) -> None:
        self._claim = claim
        self._run = run
        self._stages = asyncio.Semaphore(stages(depth))
        self._engine = _Engine(1 + depth)
        self._claiming = asyncio.Lock()
        self._waiting: set[asyncio.Task[str] | None] = set()

    @property
    def idle(self) -> bool:
        """Return whether no claimed job is in the engine or on its way to it."""
        return not self._engine.visits

    async def process(self, hold_s: float) -> str:
        """Claim the best job when the engine is nearly free, run it, and return its outcome.

        Return NOTHING_WAITS if there was nothing to claim, BUSY if the engine was not nearly free
        within `hold_s` seconds.
        """
        self._waiting.add(ticket := asyncio.current_task())
        try:
            async with asyncio.timeout(hold_s) as patience, self._stages:
                async with self._engine.visit() as visit:
                    job = await self._next(visit, patience)
                    return NOTHING_WAITS if job is None else await self._run(job, visit)
        except TimeoutError:
            if patience.expired():
                return BUSY
            raise
        finally:
            self._waiting.discard(ticket)

    def withdraw(self, ticket: asyncio.Task[str]) -> None:
        """Cancel a ticket that has not yet begun to claim. Any other runs to its end."""
        if ticket in self._waiting:
            ticket.cancel()

    async def _next(self, visit: _Occupancy, patience: asyncio.Timeout) -> Job | None:
        async with self._claiming:
            await self._engine.nearly_done()
            patience.reschedule(None)
            self._waiting.discard(asyncio.current_task())
            job = await self._claim()
            if job is not None:
                visit.claimed(job.workflow)
            return job


class _Engine:
    """The jobs in the engine, and an estimate of the time they will take."""

    def __init__(self, places: int) -> None:
        self.visits: list[_Occupancy] = []
        self.places = asyncio.Semaphore(places)
        self.changed = asyncio.Event()
        self.per_pixel_s: dict[str, deque[float]] = defaultdict(_durations)
        self.to_stage_s = _durations()

    def visit(self) -> _Occupancy:
        return _Occupancy(self)

    async def nearly_done(self) -> None:
        """Return when a job claimed now will be ready just before the engine can execute it."""
        while (wait_s := self._ahead_s() - self._lead_s()) > 0:
            self.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s if math.isfinite(wait_s) else None):
                    await self.changed.wait()

    def _ahead_s(self) -> float:
        return sum(visit.remaining_s() for visit in self.visits)

    def _lead_s(self) -> float:
        if not self.to_stage_s:
            return _FIRST_LEAD_S
        return 2 * max(self.to_stage_s) + _MARGIN_S


class _Occupancy(EngineOccupancy):
    """One job's stay in the engine, from its claim until its result has been read."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._inside = False
        self._workflow = ""
        self._pixels = 0
        self._claimed_at = 0.0
        self._began_at: float | None = None

    async def __aenter__(self) -> Self:
        await self._engine.places.acquire()
        self._inside = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._leave()

    def claimed(self, workflow: str) -> None:
        self._workflow = workflow
        self._claimed_at = time.monotonic()
        self._engine.visits.append(self)

    def staged(self, pixels: int) -> None:
        self._pixels = pixels
        self._engine.to_stage_s.append(time.monotonic() - self._claimed_at)
        self._engine.changed.set()

    def began(self) -> None:
        self._began_at = time.monotonic()
        self._engine.changed.set()

    def left(self) -> None:
        if self._inside and self._began_at is not None:
            took_s = time.monotonic() - self._began_at
            self._engine.per_pixel_s[self._workflow].append(took_s / self._pixels)
        self._leave()

    @property
    def stage(self) -> Stage:
        if not self._inside:
            return Stage.STORING
        if self._began_at is not None:
            return Stage.EXECUTING
        return Stage.STAGED if self._pixels else Stage.FETCHING

    def _leave(self) -> None:
        if not self._inside:
            return
        self._inside = False
        if self in self._engine.visits:
            self._engine.visits.remove(self)
        self._engine.changed.set()
        self._engine.places.release()

    def remaining_s(self) -> float:
        """Return a lower bound in seconds, from the fastest of the workflow's recent runs.

        Infinite while the picture's size or the workflow's speed is unknown.
        """
        known = self._engine.per_pixel_s[self._workflow]
        if not self._pixels or not known:
            return math.inf
        done_s = 0.0 if self._began_at is None else time.monotonic() - self._began_at
        return max(0.0, min(known) * self._pixels - done_s)


def _durations() -> deque[float]:
    return deque(maxlen=_REMEMBERED)
