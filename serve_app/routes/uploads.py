"""How many uploads a replica takes in at a time: each holds a whole picture in memory.

No owner has more than three quarters of them, however slow its uploads are. Decided once the
caller is known and before a byte of the body is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request

from restoration.errors import TooManyUploads
from serve_app.auth import Principal
from serve_app.routes.dependencies import authenticated

RETRY_AFTER_S = 2


class UploadSlots:
    """Counts; for one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._owner_limit = max(1, limit * 3 // 4)
        self.taken: Counter[str] = Counter()

    def take(self, owner: str) -> UploadSlot:
        """Raises TooManyUploads."""
        if self.taken.total() >= self._limit:
            raise _too_many(self._limit, "uploads")
        if self.taken[owner] >= self._owner_limit:
            raise _too_many(self._owner_limit, "uploads of yours")
        self.taken[owner] += 1
        return UploadSlot(self, owner)

    def give_back(self, owner: str) -> None:
        self.taken[owner] -= 1
        if not self.taken[owner]:
            del self.taken[owner]


def _too_many(limit: int, what: str) -> TooManyUploads:
    return TooManyUploads(
        f"{limit} {what} are on their way; send it again in a moment",
        limit=limit,
        retry_after_s=RETRY_AFTER_S,
    )


class UploadSlot:
    """To be given back once the upload is stored; giving it back twice is harmless."""

    def __init__(self, slots: UploadSlots, owner: str) -> None:
        self._slots: UploadSlots | None = slots
        self._owner = owner

    def give_back(self) -> None:
        if self._slots is not None:
            self._slots.give_back(self._owner)
            self._slots = None


async def upload_slot(
    request: Request, caller: Annotated[Principal, Depends(authenticated)]
) -> AsyncIterator[UploadSlot]:
    """A slot for this request, given back at its end at the latest. Raises TooManyUploads."""
    slots: UploadSlots = request.app.state.uploads
    slot = slots.take(caller.sub)
    try:
        yield slot
    finally:
        slot.give_back()
