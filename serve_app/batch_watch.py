"""A batch as its watchers see it: counted whenever that may have changed, until all has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import structlog

from restoration.batches import JobBatch
from restoration.errors import DependencyUnavailable
from restoration.ports import BatchStore

log = structlog.get_logger(__name__)

# Between two counts, and so between two events; up to four times as long while nothing changes.
BATCH_POLL_S = 0.5
_SLOWEST = 4


class BatchWatcher:
    """Follows batches. Holds no state between watches."""

    def __init__(self, batches: BatchStore, poll_s: float = BATCH_POLL_S) -> None:
        self._batches = batches
        self._poll_s = poll_s

    async def watch(self, batch: JobBatch) -> AsyncGenerator[JobBatch | None, None]:
        """The batch as it is, then whenever its counts have changed; None when they have not.

        The last is the batch at its end. An outage of the store is waited out.
        """
        yield batch
        delay_s = self._poll_s
        while not batch.status.is_final:
            await asyncio.sleep(delay_s)  # nobody tells when a batch changes: it is asked
            latest = await self._reread(batch)
            changed = latest.counts != batch.counts
            delay_s = self._poll_s if changed else min(2 * delay_s, _SLOWEST * self._poll_s)
            batch = latest
            yield batch if changed else None

    async def _reread(self, batch: JobBatch) -> JobBatch:
        try:
            return await self._batches.get(batch.id)
        except DependencyUnavailable as error:
            log.warning("batch_not_reread", batch_id=str(batch.id), reason=error.message)
            return batch
