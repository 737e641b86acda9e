"""Sets the metrics of waiting, running and finished jobs while a dispatcher leads. No Ray.

Only the leader sets them, so that a sum over the cluster counts each job once. A dispatcher that
loses the lead sets its gauges to 0, and its successor continues.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import NoReturn, Protocol

import structlog

from persistence.postgres.job_counts import Group
from restoration.errors import DependencyUnavailable
from restoration.jobs import JobStatus, Priority
from restoration.observability.metrics import (
    DISPATCHER_LEADS,
    JOBS,
    JOBS_FINISHED,
    OLDEST_WAITING,
    Meter,
)
from restoration.tasks import stop

log = structlog.get_logger(__name__)

PERIOD_S = 5.0


class Counts(Protocol):
    """`persistence.postgres.job_counts.Census`."""

    async def unfinished(self) -> list[Group]: ...

    async def finished(self, since: datetime | None) -> tuple[list[Group], datetime]: ...


class QueueMetrics:
    """Sets the job metrics of `meter` every `period_s` seconds. They stay if a read fails."""

    def __init__(self, counts: Counts, meter: Meter, period_s: float = PERIOD_S) -> None:
        self._counts = counts
        self._meter = meter
        self._period_s = period_s
        self._series: set[tuple[tuple[str, str], ...]] = set()
        self._since: datetime | None = None
        meter.gauge(DISPATCHER_LEADS, 0)

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[None]:
        """Set the metrics within the block."""
        self._meter.gauge(DISPATCHER_LEADS, 1)
        self._since = None
        updating = asyncio.create_task(self._keep_updating())
        try:
            yield
        finally:
            await stop(updating)
            self._set_unfinished(())
            self._meter.gauge(DISPATCHER_LEADS, 0)

    async def _keep_updating(self) -> NoReturn:
        while True:
            try:
                await self.update()
            except DependencyUnavailable as error:
                log.warning("jobs_not_counted", reason=error.message)
            except Exception:  # a bug in the counts must not stop the dispatcher
                log.exception("count_broke")
            await asyncio.sleep(self._period_s)

    async def update(self) -> None:
        """Set the metrics once. Raises DependencyUnavailable."""
        self._set_unfinished(await self._counts.unfinished())
        finished, self._since = await self._counts.finished(self._since)
        for group in finished:
            self._meter.count(JOBS_FINISHED, _labels(group), group.jobs)

    def _set_unfinished(self, groups: Sequence[Group]) -> None:
        found = Counter[tuple[tuple[str, str], ...]]()
        oldest_s = dict.fromkeys(Priority, 0.0)
        for group in groups:
            found[tuple(_labels(group).items())] += group.jobs
            if group.status is JobStatus.QUEUED:
                oldest_s[group.priority] = max(oldest_s[group.priority], group.oldest_age_s)
        self._series |= found.keys()
        for labels in self._series:  # also the series whose count is 0 now
            self._meter.gauge(JOBS, found[labels], dict(labels))
        for priority, age_s in oldest_s.items():
            self._meter.gauge(OLDEST_WAITING, age_s, {"class": priority})


def _labels(group: Group) -> Mapping[str, str]:
    return {
        "state": group.status.value,
        "class": group.priority.value,
        "owner_class": group.owner_class.value,
        "workflow": group.workflow,
    }
