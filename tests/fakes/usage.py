"""An in-memory UsageLedger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from restoration.errors import DependencyUnavailable
from restoration.jobs import AttemptRef, Job
from restoration.observability.usage import Cost, Usage


@dataclass
class _Row:
    job: Job
    began_at: datetime
    gpu_s: float


@dataclass
class MemoryUsageLedger:
    """With `down` every call fails. `clock` gives the start time of attempts."""

    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    costs: dict[AttemptRef, _Row] = field(default_factory=dict)
    down: bool = False

    async def record(self, costs: Sequence[Cost]) -> None:
        if self.down:
            raise DependencyUnavailable("Postgres: down")
        for cost in costs:
            row = self.costs.setdefault(cost.job.ref, _Row(cost.job, self.clock(), 0))
            row.gpu_s = max(row.gpu_s, cost.gpu_s)

    async def since(self, since: datetime, owner: str | None = None) -> Sequence[Usage]:
        found: dict[tuple[str, str], list[_Row]] = {}
        for cost in self.costs.values():
            if cost.began_at >= since and owner in (None, cost.job.owner):
                found.setdefault((cost.job.owner, cost.job.workflow), []).append(cost)
        sums = [
            Usage(*key, len({c.job.id for c in costs}), len(costs), sum(c.gpu_s for c in costs))
            for key, costs in found.items()
        ]
        return sorted(sums, key=lambda usage: (-usage.gpu_s, usage.owner, usage.workflow))
