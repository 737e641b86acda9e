"""Removes expired inputs, outputs and rows of ended jobs, and orphaned objects. No Ray.

A row is marked in Postgres before its object is deleted in S3, so that no row refers to missing
bytes. A crash in between leaves an orphan: an object that no row refers to. Failed submissions and
attempts that lost their lease leave orphans too. The orphan sweep deletes them all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NoReturn

import structlog

from actors.submission.uploads import UNUSED_AFTER_S
from persistence.objects.keys import INPUTS, OUTPUTS, UPLOADS, job_of
from persistence.postgres.retention import Retention
from restoration.batches import PUT_TOGETHER_S
from restoration.errors import DependencyUnavailable
from restoration.ports.objects import BlobSweeper
from restoration.settings import Settings

log = structlog.get_logger(__name__)

BATCH = 100
EXPIRY_EVERY_S = 60.0
# Rarely: the sweep lists every object, which takes long, and finds few orphans.
ORPHANS_EVERY_S = 3600.0
# A submission writes its row seconds after its object, or never. A batch may take PUT_TOGETHER_S;
# twice that leaves room for clock skew and slow transactions.
ORPHANED_AFTER_S = 2 * PUT_TOGETHER_S


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Retention times after a job's end, in seconds; 0 keeps the data forever."""

    input_s: float
    output_s: float
    row_s: float

    @classmethod
    def from_settings(cls, settings: Settings) -> Lifetimes:
        return cls(
            settings.retention_input_s, settings.retention_output_s, settings.retention_row_s
        )


class RetentionSweeper:
    """The sweeps. Each is idempotent and safe to run concurrently."""

    def __init__(self, retention: Retention, blobs: BlobSweeper, lifetimes: Lifetimes) -> None:
        self._retention = retention
        self._blobs = blobs
        self._lifetimes = lifetimes

    async def run(self) -> NoReturn:
        """Sweep periodically until cancelled. Failures are logged and retried next time."""
        orphans_at = 0.0
        while True:
            await self._supervised(self.remove_expired)
            if time.monotonic() >= orphans_at:
                await self._supervised(self.remove_orphans)
                orphans_at = time.monotonic() + ORPHANS_EVERY_S
            await asyncio.sleep(EXPIRY_EVERY_S)

    async def _supervised(self, sweep: Callable[[], Awaitable[object]]) -> None:
        try:
            await sweep()
        except DependencyUnavailable as error:
            log.warning("sweep_put_off", reason=error.message)
        except Exception:  # a bug must not stop the sweeps for good
            log.exception("sweep_broke")

    async def remove_expired(self) -> None:
        """Remove expired inputs, outputs, rows and unused uploads."""
        kept, retention = self._lifetimes, self._retention
        inputs = await self._expire(retention.expire_inputs, kept.input_s)
        outputs = await self._expire(retention.expire_outputs, kept.output_s)
        rows = await self._delete_rows()
        uploads = await self._expire_uploads()
        if inputs or outputs or rows or uploads:
            log.info("expired_removed", inputs=inputs, outputs=outputs, rows=rows, uploads=uploads)

    async def _expire(
        self, expire: Callable[[float, int], Awaitable[Sequence[str]]], kept_s: float
    ) -> int:
        removed = 0
        while kept_s and (keys := await expire(kept_s, BATCH)):
            await self._blobs.delete_many(keys)
            removed += len(keys)
        return removed

    async def _expire_uploads(self) -> int:
        removed = 0
        while keys := await self._retention.expire_uploads(BATCH):
            await self._blobs.delete_many(keys)
            removed += len(keys)
        return removed

    async def _delete_rows(self) -> int:
        removed, kept_s = 0, self._lifetimes.row_s
        if not kept_s:
            return 0
        while deleted := await self._retention.delete_rows(kept_s, BATCH):
            removed += deleted
        await self._retention.forget_emptied(kept_s)
        return removed

    async def remove_orphans(self) -> None:
        """Delete old objects that no row refers to; newer ones may get their row yet."""
        now = datetime.now(UTC)
        older_than = now - timedelta(seconds=ORPHANED_AFTER_S)
        removed = {}
        for prefix, find_wanted in (
            (INPUTS, self._retention.wanted_inputs),
            (OUTPUTS, self._retention.wanted_outputs),
        ):
            removed[prefix.rstrip("/")] = 0
            async for page in self._blobs.list(prefix, older_than):
                ours = {key for key in page if job_of(key) is not None}
                orphans = sorted(ours.difference(await find_wanted(ours)))
                await self._blobs.delete_many(orphans)
                removed[prefix.rstrip("/")] += len(orphans)
        removed["uploads"] = 0
        older_than = now - timedelta(seconds=UNUSED_AFTER_S)
        async for unused in self._blobs.list(UPLOADS, older_than):
            await self._blobs.delete_many(unused)
            removed["uploads"] += len(unused)
        if any(removed.values()):
            log.info("orphans_removed", **removed)
