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


def upload_slots(limit: int) -> FairPlaces:
    """Return the places for uploads of one replica."""
    return FairPlaces(limit, "uploads", as_many_as_are_free, error=TooManyUploads)


async def _upload_slot(
    request: Request, caller: Annotated[Principal, Depends(authenticated)]
) -> AsyncIterator[Place]:
    """Yield a slot for this request, and give it back at its end.

    It waits for a slot only if the owner holds none. Raises TooManyUploads.
    """
    slots: FairPlaces = request.app.state.uploads
    if slots.held(caller.sub) or slots.waiting(caller.sub):
        taken = slots.take_now(caller.sub)
    else:
        taken = await slots.take(caller.sub, QUEUE_TIMEOUT_S)
    with taken as slot:
        yield slot


# Give it back once the upload is stored; giving it back twice is harmless.
UploadSlot = Annotated[Place, Depends(_upload_slot)]
