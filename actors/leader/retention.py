"""Removes expired inputs, outputs and rows of ended jobs, and orphaned objects. No Ray.

A row is marked in Postgres before its object is deleted in S3, so that no row refers to missing
bytes. A crash in between leaves an orphan: an object that no row refers to. Failed submissions and
attempts that lost their lease leave orphans too. The orphan sweep deletes them all.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
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
        removed = Counter[str]()
        if kept.input_s:
            removed["inputs"] = await self._expire(partial(retention.expire_inputs, kept.input_s))
        if kept.output_s:
            removed["outputs"] = await self._expire(
                partial(retention.expire_outputs, kept.output_s)
            )
        if kept.row_s:
            while deleted := await retention.delete_rows(kept.row_s, BATCH):
                removed["rows"] += deleted
            await retention.forget_emptied(kept.row_s)
        removed["uploads"] = await self._expire(retention.expire_uploads)
        if removed.total():
            log.info("expired_removed", **removed)

    async def _expire(self, expire: Callable[[int], Awaitable[Sequence[str]]]) -> int:
        removed = 0
        while keys := await expire(BATCH):
            await self._blobs.delete_many(keys)
            removed += len(keys)
        return removed

    async def remove_orphans(self) -> None:
        """Delete old objects that no row refers to; newer ones may get their row yet."""
        now = datetime.now(UTC)
        older_than = now - timedelta(seconds=ORPHANED_AFTER_S)
        removed = Counter[str]()
        for prefix, find_wanted in (
            (INPUTS, self._retention.wanted_inputs),
            (OUTPUTS, self._retention.wanted_outputs),
        ):
            async for page in self._blobs.list(prefix, older_than):
                ours = {key for key in page if job_of(key) is not None}
                orphans = sorted(ours.difference(await find_wanted(ours)))
                await self._blobs.delete_many(orphans)
                removed[prefix.rstrip("/")] += len(orphans)
        older_than = now - timedelta(seconds=UNUSED_AFTER_S)
        async for unused in self._blobs.list(UPLOADS, older_than):
            await self._blobs.delete_many(unused)
            removed["uploads"] += len(unused)
        if removed.total():
            log.info("orphans_removed", **removed)
