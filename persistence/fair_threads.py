"""Threads for blocking calls, which the owners of requests use in turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from restoration.errors import DependencyUnavailable, TooManyAtOnce
from restoration.limits.fair_places import FairPlaces, current_owner

_T = TypeVar("_T")


class FairThreads:
    """A fixed number of threads, for use on one event loop."""

    def __init__(self, number: int, service: str, queue_timeout_s: float | None = None) -> None:
        """Create `number` threads. `service` is the called service, for errors and thread names."""
        self._service = service
        self._queue_timeout_s = queue_timeout_s
        self._places = FairPlaces(number, f"calls to {service}")
        self._threads = ThreadPoolExecutor(number, thread_name_prefix=service.lower())

    def begin(self, work: Callable[[], _T]) -> Future[_T]:
        """Call `work` in a thread without waiting for a turn, to prepare for the other calls."""
        return self._threads.submit(work)

    async def run(self, work: Callable[[], _T]) -> _T:
        """Wait for the current owner's turn, then call `work` in a thread and return its result.

        Cancelling the caller does not stop a call that has begun; it keeps its owner's place until
        it ends. Raises DependencyUnavailable if no thread becomes free in time: the client has
        probably left by then, and running the call would only delay others.
        """
        loop = asyncio.get_running_loop()
        try:
            place = await self._places.take(current_owner.get(), self._queue_timeout_s)
        except TooManyAtOnce:
            raise DependencyUnavailable(f"{self._service}: no thread became free in time") from None
        try:
            call = self._threads.submit(work)
        except RuntimeError:  # the threads are shut down
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
        """Cancel the calls that have not begun, and wait for the others."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
