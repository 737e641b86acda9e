"""Limit the bytes of uploads that a replica holds in memory, in total and for each owner.

A request is counted before its body is read, by its declared length; without one, as the bytes
arrive. It counts at most the bytes that it can hold: of a batch, one photo is read while another is
examined and stored. An owner gets more only while as much is left for the others, so that several
greedy owners cannot fill the replica (docs/decisions/0031-bound-the-bytes-in-memory.md).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Annotated

from fastapi import Depends, Request

from restoration.errors import TooManyUploads
from serve_app.auth.tokens import Principal
from serve_app.routes.dependencies import authenticated, services_of

RETRY_AFTER_S = 2
_LENGTH = re.compile("[0-9]{1,18}")


class UploadBytes:
    """Counts the bytes of uploads in memory, by owner. Belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken: Counter[str] = Counter()

    def take(self, owner: str, size_bytes: int) -> None:
        """Count `size_bytes` for the owner. Raises TooManyUploads."""
        free = self._limit - self.taken.total() - size_bytes
        if size_bytes and self.taken[owner] + size_bytes > free:
            raise TooManyUploads(
                f"the memory for uploads is full: {self.taken.total()} bytes are being "
                f"received, {self.taken[owner]} of them from you; try again in a few seconds",
                limit=self._limit,
                retry_after_s=RETRY_AFTER_S,
            )
        self.taken[owner] += size_bytes

    def give_back(self, owner: str, size_bytes: int) -> None:
        self.taken[owner] -= size_bytes
        if not self.taken[owner]:
            del self.taken[owner]


class UploadShare:
    """The bytes counted for one request. Giving them back twice is harmless."""

    def __init__(self, of: UploadBytes, owner: str, at_most: int) -> None:
        """Create an empty share of a request whose body holds at most `at_most` bytes in memory."""
        self._of = of
        self._owner = owner
        self._uncounted = at_most
        self._size_bytes = 0

    def declare(self, size_bytes: int) -> None:
        """Count a body of this length. Raises TooManyUploads."""
        self.take(min(size_bytes, self._uncounted))
        self._uncounted = 0

    def arrive(self, size_bytes: int) -> None:
        """Count more bytes of a body without a declared length. Raises TooManyUploads."""
        counted = min(size_bytes, self._uncounted)
        self.take(counted)
        self._uncounted -= counted

    def take(self, size_bytes: int) -> None:
        """Count bytes that are held besides the body. Raises TooManyUploads."""
        self._of.take(self._owner, size_bytes)
        self._size_bytes += size_bytes

    def give_back(self) -> None:
        """Give the bytes back. Call this once the upload is stored."""
        self._of.give_back(self._owner, self._size_bytes)
        self._size_bytes = self._uncounted = 0


def _share_of(photos: int) -> Callable[..., AsyncIterator[UploadShare]]:
    """Return a dependency that yields a share for a request that holds so many photos at a time.

    The share is given back at the request's end. Raises TooManyUploads.
    """

    async def share_of_request(
        request: Request, caller: Annotated[Principal, Depends(authenticated)]
    ) -> AsyncIterator[UploadShare]:
        at_most = photos * services_of(request).settings.upload_max_bytes
        share = UploadShare(request.app.state.upload_bytes, caller.sub, at_most)
        declared = request.headers.get("content-length", "")
        if _LENGTH.fullmatch(declared):
            share.declare(int(declared))
        request.state.count_body = share.arrive  # called by `serve_app.asgi.middleware.BodyLimit`
        try:
            yield share
        finally:
            share.give_back()

    return share_of_request


PhotoShare = Annotated[UploadShare, Depends(_share_of(1))]
# One photo is read while another is examined and stored.
BatchShare = Annotated[UploadShare, Depends(_share_of(2))]
