"""Share a limited number of places between owners: threads, processes, uploads, event streams.

A free place goes to the waiting owner that holds the fewest; owners that hold equally many take
turns. Within an owner it goes to the request that has waited longest. A limit on what one owner
holds leaves places for the others (docs/decisions/0030-lend-places-to-owners-in-turns.md).
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Self

from restoration.errors import TooManyAtOnce

RETRY_AFTER_S = 2

Owner = str | None
"""None stands for the service itself, which takes turns like one owner but has no limit."""

Share = Callable[[int, int], int]
"""Return how many places an owner may hold, given how many there are and how many are free."""

current_owner: ContextVar[Owner] = ContextVar("current_owner", default=None)
"""The owner that the current task works for, set when a request is authenticated."""


def context_of(owner: Owner) -> Context:
    """Return a copy of the current context with this owner, for a task that outlives the caller."""
    context = copy_context()
    context.run(current_owner.set, owner)
    return context


def all_but_one(places: int, _free: int) -> int:
    """Leave one place for other owners; for places that are held briefly. The minimum is 1."""
    return max(1, places - 1)


def as_many_as_are_free(_places: int, free: int) -> int:
    """Let an owner take another place only while it holds fewer than are free.

    For places that a client can hold for long: one owner gets at most half of them, the next half
    of the rest, and so on, so that several owners together do not take them all.
    """
    return free


class Place:
    """A held place. Use it as a context manager, or call `give_back`."""

    def __init__(self, places: FairPlaces, owner: Owner) -> None:
        self._places: FairPlaces | None = places
        self._owner = owner

    def give_back(self) -> None:
        """Free the place for the next owner. Idempotent."""
        if self._places is not None:
            self._places._give_back(self._owner)
            self._places = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


class FairPlaces:
    """A fixed number of places, for use on one event loop."""

    def __init__(
        self,
        places: int,
        what: str,
        share: Share = all_but_one,
        *,
        max_waiting: int | None = None,
        error: type[TooManyAtOnce] = TooManyAtOnce,
    ) -> None:
        """Create `places` places.

        `what` names their use in errors ("uploads"). At most `max_waiting` requests of each owner
        wait (None: no limit). `error` is raised in place of TooManyAtOnce.
        """
        self._places = places
        self._what = what
        self._share = share
        self._max_waiting = max_waiting
        self._error = error
        self._held: Counter[Owner] = Counter()
        # Owners in turn order: an owner moves to the end when it starts to wait or gets a place.
        self._waiting: dict[Owner, deque[asyncio.Future[None]]] = {}

    @property
    def taken(self) -> int:
        return self._held.total()

    @property
    def free(self) -> int:
        return self._places - self.taken

    def held(self, owner: Owner) -> int:
        return self._held[owner]

    def waiting(self, owner: Owner) -> int:
        return len(self._waiting.get(owner, ()))

    def has_room_for(self, owner: Owner) -> bool:
        """Return whether the owner would get a place at once.

        This passes over no waiting owner: one that is allowed a free place has it already.
        """
        free = self.free
        return free > 0 and (owner is None or self._held[owner] < self._share(self._places, free))

    @asynccontextmanager
    async def turn(self, owner: Owner, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Wait for a place and hold it for the block. Raises the errors of `take`."""
        with await self.take(owner, timeout_s):
            yield

    async def take(self, owner: Owner, timeout_s: float | None = None) -> Place:
        """Wait for a place and return it. A caller that is cancelled while it waits holds none.

        Raises TooManyAtOnce if there is none after `timeout_s`, and at once if `max_waiting`
        requests of the owner wait already.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._take(owner)
        except TimeoutError:
            return self.take_now(owner)

    async def _take(self, owner: Owner) -> Place:
        if self.has_room_for(owner):
            return self._lend(owner)
        if self._max_waiting is not None and owner is not None:
            if self.waiting(owner) >= self._max_waiting:
                raise self._too_many(self._max_waiting, f"of your {self._what} are waiting")
        lent = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(lent)
        try:
            await lent
        except asyncio.CancelledError:
            if not lent.cancelled():  # the place was lent just before the cancellation
                self._give_back(owner)
            elif lent in (queue := self._waiting.get(owner, deque())):
                queue.remove(lent)
                if not queue:
                    del self._waiting[owner]
            raise
        return Place(self, owner)

    def take_now(self, owner: Owner) -> Place:
        """Return a place without waiting. Raises TooManyAtOnce if there is none for the owner."""
        if self.has_room_for(owner):
            return self._lend(owner)
        if self.free:
            raise self._too_many(self.held(owner), f"of your {self._what} are in progress")
        raise self._too_many(self._places, f"{self._what} are in progress")

    def _lend(self, owner: Owner) -> Place:
        self._held[owner] += 1
        return Place(self, owner)

    def _give_back(self, owner: Owner) -> None:
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        # Lend the free places to the waiting owners.
        while ready := [owner for owner in self._waiting if self.has_room_for(owner)]:
            owner = min(ready, key=self.held)
            lent = self._waiting[owner].popleft()
            if not lent.done():  # done means cancelled, and the owner then keeps its turn
                self._held[owner] += 1
                lent.set_result(None)
                self._waiting[owner] = self._waiting.pop(owner)
            if not self._waiting[owner]:
                del self._waiting[owner]

    def _too_many(self, limit: int, reason: str) -> TooManyAtOnce:
        return self._error(
            f"{limit} {reason}, the maximum at the moment; try again when one of them has ended",
            limit=limit,
            retry_after_s=RETRY_AFTER_S,
        )
