"""How many uploads a replica takes in at a time: each holds a whole picture in memory.

An owner gets another place only while more are free than it has, however slow its uploads are.
Decided once the caller is known and before a byte of the body is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request

from restoration.errors import TooManyUploads
from restoration.limits.fair_places import FairPlaces, Place, as_many_as_are_free
from serve_app.auth.tokens import Principal
from serve_app.routes.dependencies import authenticated

# How long the first upload of an owner waits for a place while others have them all.
QUEUE_TIMEOUT_S = 10.0

UploadSlot = Place
"""To be given back once the upload is stored; giving it back twice is harmless."""


class UploadSlots:
    """For one event loop."""

    def __init__(self, limit: int) -> None:
        self.places = FairPlaces(limit, "uploads", as_many_as_are_free, error=TooManyUploads)

    async def take(self, owner: str) -> UploadSlot:
        """Wait for a place if the owner has none. Raises TooManyUploads."""
        if self.places.held(owner) or self.places.waiting(owner):
            return self.places.take_now(owner)
        return await self.places.take(owner, QUEUE_TIMEOUT_S)


async def upload_slot(
    request: Request, caller: Annotated[Principal, Depends(authenticated)]
) -> AsyncIterator[UploadSlot]:
    """A slot for this request, given back at its end at the latest. Raises TooManyUploads."""
    slots: UploadSlots = request.app.state.uploads
    with await slots.take(caller.sub) as slot:
        yield slot
