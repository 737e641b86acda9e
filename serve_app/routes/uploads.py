"""How many uploads a replica takes in at a time: each holds a whole picture in memory.

Decided once the caller is known and before a byte of the body is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request

from restoration.errors import TooManyUploads
from serve_app.routes.dependencies import authenticated

RETRY_AFTER_S = 2


class UploadSlots:
    """Counts; for one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken = 0

    def take(self) -> UploadSlot:
        """Raises TooManyUploads."""
        if self.taken >= self._limit:
            raise TooManyUploads(
                f"{self._limit} uploads are on their way; send it again in a moment",
                limit=self._limit,
                retry_after_s=RETRY_AFTER_S,
            )
        self.taken += 1
        return UploadSlot(self)


class UploadSlot:
    """To be given back once the upload is stored; giving it back twice is harmless."""

    def __init__(self, slots: UploadSlots) -> None:
        self._slots: UploadSlots | None = slots

    def give_back(self) -> None:
        if self._slots is not None:
            self._slots.taken -= 1
            self._slots = None


async def upload_slot(
    request: Request, _caller: Annotated[object, Depends(authenticated)]
) -> AsyncIterator[UploadSlot]:
    """A slot for this request, given back at its end at the latest. Raises TooManyUploads."""
    slots: UploadSlots = request.app.state.uploads
    slot = slots.take()
    try:
        yield slot
    finally:
        slot.give_back()
