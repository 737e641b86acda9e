"""Measure how long an owner with many requests at once delays the request of another owner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context

from restoration.limits.fair_places import current_owner

REQUESTS = 40
# Another owner's request may take three times as long as alone: it waits for at most two others.
FEW = 2
DEADLINE_S: float = 30


class Gate:
    """A gate that lets threads through one at a time, each on request."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._changed = threading.Condition()
        self._looker = ThreadPoolExecutor(1)  # the default threads may be the ones that wait
        self.waiting = 0
        self.passed = 0

    def pass_through(self) -> None:
        """Block the calling thread until it is let through."""
        self._add(waiting=1)
        assert self._permits.acquire(timeout=4 * DEADLINE_S)
        self._add(waiting=-1, passed=1)

    def open(self) -> None:
        self._permits.release(REQUESTS)

    async def let_one_through(self) -> None:
        passed = self.passed
        self._permits.release()
        await self.until(lambda: self.passed > passed)

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._looker, self._wait_for, reached)

    def _wait_for(self, reached: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(reached, DEADLINE_S)

    def _add(self, waiting: int = 0, passed: int = 0) -> None:
        with self._changed:
            self.waiting += waiting
            self.passed += passed
            self._changed.notify_all()


def in_the_name_of(owner: str, work: Awaitable[object]) -> asyncio.Task[object]:
    """Run `work` in a task of its own, as a request of `owner`."""

    async def run() -> object:
        current_owner.set(owner)
        return await work

    return Context().run(asyncio.ensure_future, run())


async def overtaken(
    gate: Gate, greedy: Callable[[], Awaitable[object]], modest: Callable[[], Awaitable[object]]
) -> int:
    """Return how many of a greedy owner's REQUESTS, which all wait at `gate` or before it, ended
    before another owner's request did. Return FEW if that many were enough."""
    all_of_it = [in_the_name_of("greedy", greedy()) for _ in range(REQUESTS)]
    await gate.until(lambda: gate.waiting > 0)
    other = in_the_name_of("modest", modest())
    for _ in range(FEW):
        await gate.let_one_through()
    ended, patience_s = FEW, DEADLINE_S
    while not (await asyncio.wait([other], timeout=patience_s))[0]:
        await gate.let_one_through()
        ended, patience_s = ended + 1, 0.2  # failed by now; the figure shows by how much
    gate.open()
    await asyncio.gather(other, *all_of_it)
    return ended
