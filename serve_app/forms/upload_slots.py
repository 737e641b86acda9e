"""Limit the uploads that a replica receives at a time: each holds a whole picture in memory.

An owner gets another place only while more places are free than it holds, however slow its uploads
are. The limit applies once the caller is authenticated, before the body is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request

from restoration.errors import TooManyUploads
from restoration.limits.fair_places import FairPlaces, Place, as_many_as_are_free
from serve_app.auth.tokens import Principal
from serve_app.routes.dependencies import authenticated

# How long an owner's first upload waits for a place while other owners hold all of them.
QUEUE_TIMEOUT_S = 10.0

UploadSlot = Place
"""Give it back once the upload is stored; giving it back twice is harmless."""


class UploadSlots:
    """The places for uploads. Belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        self.places = FairPlaces(limit, "uploads", as_many_as_are_free, error=TooManyUploads)

    async def take(self, owner: str) -> UploadSlot:
        """Return a place for the owner, waiting for one only if it holds none.

        Raises TooManyUploads.
        """
        if self.places.held(owner) or self.places.waiting(owner):
            return self.places.take_now(owner)
        return await self.places.take(owner, QUEUE_TIMEOUT_S)


async def upload_slot(
    request: Request, caller: Annotated[Principal, Depends(authenticated)]
) -> AsyncIterator[UploadSlot]:
    """Yield a slot for this request, and give it back at its end. Raises TooManyUploads."""
    slots: UploadSlots = request.app.state.uploads
    with await slots.take(caller.sub) as slot:
        yield slot
