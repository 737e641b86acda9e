"""A job's events from the board, with a timeout, across outages of the board."""

from __future__ import annotations

import asyncio
from typing import Self
from uuid import UUID

import structlog

from restoration.errors import DependencyUnavailable
from restoration.ports import StampedEvent, StatusBoard

log = structlog.get_logger(__name__)

_BUFFERED_EVENTS = 64


class Feed:
    """From the first event that the board has kept. Close it by leaving its context."""

    def __init__(self, board: StatusBoard, job_id: UUID) -> None:
        self._board = board
        self._job_id = job_id
        self._after_id: str | None = None
        self._events: asyncio.Queue[StampedEvent] = asyncio.Queue(_BUFFERED_EVENTS)
        self._pump: asyncio.Task[None] | None = None
        self._poll_at = 0.0  # zero: to be set by the next call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)

    async def next(self, poll_s: float) -> StampedEvent | None:
        """The next event; None once in every `poll_s`, however many events there are."""
        if self._pump is None or self._pump.done():
            self._start()
        if not self._poll_at:
            self._poll_at = asyncio.get_running_loop().time() + poll_s
        try:
            async with asyncio.timeout_at(self._poll_at):
                return await self._events.get()
        except TimeoutError:
            self._poll_at = 0.0
            return None

    def _start(self) -> None:
        if self._pump is not None:
            self._pump.result()  # what nobody expected ends the watch
        self._pump = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            async for stamped in self._board.follow(self._job_id, self._after_id):
                await self._events.put(stamped)
                self._after_id = stamped.id
        except DependencyUnavailable as error:
            log.warning("progress_unavailable", job_id=str(self._job_id), reason=error.message)
