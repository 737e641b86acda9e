"""Limit the downloads that a replica sends at a time, and share the places among owners.

The client decides how long a download lasts. Redirects to S3 take no place here.
"""

from __future__ import annotations

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from restoration.limits.fair_places import FairPlaces

# How long a download waits for a place before it is refused.
QUEUE_TIMEOUT_S = 10.0


class Download(Response):
    """A response with a picture, sent while it holds one of the owner's places for downloads.

    It waits for a place before it sends anything. Raises TooManyAtOnce if it gets none in time.
    """

    def __init__(self, picture: Response, owner: str) -> None:
        super().__init__()
        self._picture = picture
        self._owner = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        places: FairPlaces = scope["app"].state.downloads
        async with places.turn(self._owner, QUEUE_TIMEOUT_S):
            await self._picture(scope, receive, send)


def may_download_now(request: Request, owner: str) -> bool:
    """Return whether the owner would get a place for a download without waiting."""
    places: FairPlaces = request.app.state.downloads
    return places.has_room_for(owner)
