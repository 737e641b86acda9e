"""The fair queue in memory: the work of the Postgres store's triggers and of its claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from uuid import UUID

from restoration.affinity import WINDOW_JOBS, WINDOW_TURNS
from restoration.jobs import Job, JobStatus, Priority

AWAY = timedelta(minutes=10)
ELSEWHERE = timedelta(seconds=2)
NEVER = datetime(1970, 1, 1, tzinfo=UTC)
_CLASSES = list(Priority)

Turn = tuple[datetime, int]  # numbered because a test's clock may stand still


@dataclass
class Turns:
    """The turns of owners, for each priority class."""

    last: dict[tuple[str, Priority], Turn] = field(default_factory=dict)
    promoted: set[tuple[str, Priority]] = field(default_factory=set)
    workers: dict[UUID, str] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=count)

    def join(self, job: Job, rows: Iterable[Job], now: datetime) -> None:
        """Give the owner of `job` a turn if none of its jobs in `rows` is waiting."""
        waiting = {_turn_of(row) for row in rows if row.status is JobStatus.QUEUED}
        if (turn := _turn_of(job)) not in waiting:
            self.promoted.discard(turn)
            came = (now - AWAY, next(self._numbers))
            self.last[turn] = max(self.last.get(turn, (NEVER, 0)), came)

    def take(self, job: Job, now: datetime) -> None:
        self.last[_turn_of(job)] = (now, next(self._numbers))

    def hand_back(self, job: Job, failed: bool) -> None:
        self.workers.pop(job.id, None)
        if failed and job.worker is not None:
            self.workers[job.id] = job.worker

    def elsewhere(self, job: Job, worker: str, now: datetime) -> bool:
        """Return whether the job is reserved for other workers."""
        return self.workers.get(job.id) == worker and job.available_at > now - ELSEWHERE

    def put_first(self, job: Job) -> None:
        self.promoted.add(_turn_of(job))
        self.last[_turn_of(job)] = (NEVER, next(self._numbers))

    def promote(self, raised: Iterable[Job]) -> None:
        self.promoted = {_turn_of(job) for job in raised}

    def window(self, able: Iterable[Job]) -> Iterator[Job]:
        """Yield the jobs that a worker may choose from; `able` is ordered by turn."""
        taken = Counter[tuple[str, Priority]]()
        best: int | None = None
        for job in able:
            best = self.key(job)[0] if best is None else best
            turn = _turn_of(job)
            in_sight = turn in taken or len(taken) < WINDOW_TURNS
            if self.key(job)[0] == best and in_sight and taken[turn] < WINDOW_JOBS:
                taken[turn] += 1
                yield job

    def key(self, job: Job) -> tuple[int, Turn]:
        turn = _turn_of(job)
        counts_as = Priority.INTERACTIVE if turn in self.promoted else job.options.priority
        return _CLASSES.index(counts_as), self.last[turn]


def _turn_of(job: Job) -> tuple[str, Priority]:
    return job.owner, job.options.priority
