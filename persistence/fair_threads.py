"""Threads for calls that block, lent to the owners of the requests in turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from restoration.errors import DependencyUnavailable, TooManyAtOnce
from restoration.limits.fair_places import FairPlaces, current_owner

_T = TypeVar("_T")


class FairThreads:
    """As many threads as places; for one event loop."""

    def __init__(self, number: int, service: str, queue_timeout_s: float | None = None) -> None:
        """`service` is what the calls go to, for errors and the names of the threads."""
        self._service = service
        self._queue_timeout_s = queue_timeout_s
        self._places = FairPlaces(number, f"calls to {service}")
        self._threads = ThreadPoolExecutor(number, thread_name_prefix=service.lower())

    def begin(self, work: Callable[[], _T]) -> Future[_T]:
        """Call `work` in a thread without waiting for a turn: to prepare what the others use."""
        return self._threads.submit(work)

    async def run(self, work: Callable[[], _T]) -> _T:
        """Call `work` in a thread, in the turn of the owner that the task works for.

        Cancelling the caller does not stop a call that has begun, which keeps its owner's place
        until it ends. Raises DependencyUnavailable when no thread became free in time: the caller
        has probably gone, and to run it all the same would keep the others waiting.
        """
        loop = asyncio.get_running_loop()
        try:
            place = await self._places.take(current_owner.get(), self._queue_timeout_s)
        except TooManyAtOnce:
            raise DependencyUnavailable(f"{self._service}: no thread became free in time") from None
        try:
            call = self._threads.submit(work)
        except RuntimeError:  # they are closed
            place.give_back()
            raise
        try:
            return await asyncio.wrap_future(call)
        finally:
            if call.done():
                place.give_back()
            else:
                call.add_done_callback(lambda _: loop.call_soon_threadsafe(place.give_back))

    async def aclose(self) -> None:
        """Wait for the calls that have begun."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
