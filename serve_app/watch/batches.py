"""Watch batches by polling their counts, at most every half second, until they have ended.

No event reports a change of a batch, so its counts are read from the store. All watchers of a batch
in a replica share them. One task for each owner reads the owner's batches, one statement after
another: an owner with a thousand watched batches delays its own events only, and uses one
connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from uuid import UUID

import structlog

from restoration.batches import JobBatch
from restoration.errors import BatchNotFound, DependencyUnavailable
from restoration.limits.fair_places import context_of
from restoration.ports.batches import BatchStore
from serve_app.watch.shared import Shared

log = structlog.get_logger(__name__)

# The interval between reads, and so between events; up to four times as long without changes.
BATCH_POLL_S = 0.5
_SLOWEST = 4
# Batches read in one statement, each of up to 1,000 jobs.
READ_AT_ONCE = 50


class BatchWatcher:
    """Polls the watched batches for all watchers of a replica."""

    def __init__(self, batches: BatchStore, poll_s: float = BATCH_POLL_S) -> None:
        self._batches = batches
        self._poll_s = poll_s
        self._live: dict[UUID, _LiveBatch] = {}
        self._polls: dict[str, asyncio.Task[None]] = {}

    async def watch(self, batch: JobBatch) -> AsyncGenerator[JobBatch | None, None]:
        """Yield the batch, then after each read the batch if its counts changed, or None.

        The last is the batch at its end. Outages of the store are waited out. Raises BatchNotFound
        if the batch is removed meanwhile.
        """
        yield batch
        if batch.status.is_final:
            return
        async with self._joined(batch) as live:
            reads = live.reads
            while not batch.status.is_final:
                # it may have been read since, while this watcher was sending
                while live.reads == reads and not live.batch.status.is_final:
                    await live.wait()
                reads, changed = live.reads, live.batch.counts != batch.counts
                batch = live.batch
                yield batch if changed else None

    @asynccontextmanager
    async def _joined(self, batch: JobBatch) -> AsyncIterator[_LiveBatch]:
        live = self._live.get(batch.id)
        if live is None:
            live = self._live[batch.id] = _LiveBatch(batch)
        if batch.owner not in self._polls:
            poll = asyncio.create_task(self._poll(batch.owner), context=context_of(batch.owner))
            poll.add_done_callback(partial(self._ended, batch.owner))
            self._polls[batch.owner] = poll
        live.users += 1
        try:
            yield live
        finally:
            live.users -= 1
            if not live.users:
                del self._live[batch.id]
                if not self._of(batch.owner):
                    self._polls.pop(batch.owner).cancel()

    def _of(self, owner: str) -> Sequence[_LiveBatch]:
        return [live for live in self._live.values() if live.batch.owner == owner]

    async def _poll(self, owner: str) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            due = [live for live in self._of(owner) if live.is_due()]
            for start in range(0, len(due), READ_AT_ONCE):
                await self._read(due[start : start + READ_AT_ONCE])

    async def _read(self, due: Sequence[_LiveBatch]) -> None:
        try:
            found = await self._batches.find([live.batch.id for live in due])
        except DependencyUnavailable as error:
            log.warning("batches_not_reread", batches=len(due), reason=error.message)
            found = [live.batch for live in due]
        latest = {batch.id: batch for batch in found}
        for live in due:
            if live.batch.id in latest:
                live.learn(latest[live.batch.id])
            else:
                live.fail(BatchNotFound("the batch does not exist", batch_id=str(live.batch.id)))

    def _ended(self, owner: str, poll: asyncio.Task[None]) -> None:
        # Only a bug ends the task early. It must reach the watchers, and not look like an outage.
        if not poll.cancelled() and (error := poll.exception()) is not None:
            for live in self._of(owner):
                live.fail(error)


class _LiveBatch(Shared):
    """A watched batch, as last read."""

    def __init__(self, batch: JobBatch) -> None:
        super().__init__()
        self.batch = batch
        self.reads = 0
        self._pause = self._polls_left = 1

    def is_due(self) -> bool:
        """Count a poll, and return whether it should read the batch."""
        self._polls_left -= 1
        return self._polls_left <= 0 and not self.batch.status.is_final

    def learn(self, latest: JobBatch) -> None:
        changed = latest.counts != self.batch.counts
        self._pause = 1 if changed else min(2 * self._pause, _SLOWEST)
        self._polls_left = self._pause
        self.batch = latest
        self.reads += 1
        self.wake()
