"""How many bytes of uploads a replica holds in memory at a time, in all and of one owner.

A request is counted before its body is read, with what it declares; without a length, as it
arrives. It counts as no more than it can hold: of a batch one photo is read while another is
examined and stored. An owner gets more only
while as much is left for the others, so that several greedy ones do not fill the replica
(docs/decisions/0031-bound-the-bytes-in-memory.md).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, Request

from restoration.errors import TooManyUploads
from serve_app.auth.tokens import Principal
from serve_app.routes.dependencies import authenticated, services_of

RETRY_AFTER_S = 2
_LENGTH = re.compile("[0-9]{1,18}")
PHOTOS_OF_A_BATCH = 2


class UploadBytes:
    """Counts; for one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken: Counter[str] = Counter()

    def take(self, owner: str, size_bytes: int) -> None:
        """Raises TooManyUploads."""
        free = self._limit - self.taken.total() - size_bytes
        if size_bytes and self.taken[owner] + size_bytes > free:
            raise TooManyUploads(
                f"uploads of {self.taken.total()} bytes are on their way, {self.taken[owner]} of "
                "them yours; send it again in a moment",
                limit=self._limit,
                retry_after_s=RETRY_AFTER_S,
            )
        self.taken[owner] += size_bytes

    def give_back(self, owner: str, size_bytes: int) -> None:
        self.taken[owner] -= size_bytes
        if not self.taken[owner]:
            del self.taken[owner]


class UploadShare:
    """Bytes that are counted for one request; giving them back twice is harmless."""

    def __init__(self, of: UploadBytes, owner: str, at_most: int) -> None:
        """Of the request's body `at_most` so many are held."""
        self._of = of
        self._owner = owner
        self._uncounted = at_most
        self._size_bytes = 0

    def declare(self, size_bytes: int) -> None:
        """Count a body of this length. Raises TooManyUploads."""
        self.take(min(size_bytes, self._uncounted))
        self._uncounted = 0

    def arrive(self, size_bytes: int) -> None:
        """Count more of a body that has declared no length. Raises TooManyUploads."""
        counted = min(size_bytes, self._uncounted)
        self.take(counted)
        self._uncounted -= counted

    def take(self, size_bytes: int) -> None:
        """Count what is held besides. Raises TooManyUploads."""
        self._of.take(self._owner, size_bytes)
        self._size_bytes += size_bytes

    def give_back(self) -> None:
        """To be called once the upload is stored."""
        self._of.give_back(self._owner, self._size_bytes)
        self._size_bytes = self._uncounted = 0


async def photo_share(
    request: Request, caller: Annotated[Principal, Depends(authenticated)]
) -> AsyncIterator[UploadShare]:
    """A share for this request, given back at its end at the latest. Raises TooManyUploads."""
    with _share(request, caller, 1) as share:
        yield share


async def batch_share(
    request: Request, caller: Annotated[Principal, Depends(authenticated)]
) -> AsyncIterator[UploadShare]:
    """As `photo_share`."""
    with _share(request, caller, PHOTOS_OF_A_BATCH) as share:
        yield share


@contextmanager
def _share(request: Request, caller: Principal, photos: int) -> Iterator[UploadShare]:
    at_most = photos * services_of(request).settings.upload_max_bytes
    share = UploadShare(request.app.state.upload_bytes, caller.sub, at_most)
    declared = request.headers.get("content-length", "")
    if _LENGTH.fullmatch(declared):
        share.declare(int(declared))
    request.state.count_body = share.arrive  # see `serve_app.asgi.middleware.BodyLimit`
    try:
        yield share
    finally:
        share.give_back()
