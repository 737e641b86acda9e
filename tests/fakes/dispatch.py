"""A dispatcher without Postgres and Ray, whose signals and workers are controlled by the test."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.dispatcher import Dispatch
from actors.execution.pipeline import TicketOutcome
from persistence.postgres.leadership import Leadership
from restoration.errors import DependencyUnavailable
from restoration.jobs import AttemptRef, Job
from tests.fakes.job_store import MemoryJobStore
from tests.support.polling import until
from tests.support.samples import new_job

DEADLINE_S = 300
NEVER_S = 3600.0
WINDOW = 3


class Signals(Leadership):
    """Leadership without Postgres: `hint` wakes the leader, `lose` acts like a cut connection."""

    def __init__(self) -> None:
        self._hint = asyncio.Event()
        self._hints: list[str] = []
        self._lost = False

    async def wait(self, timeout_s: float) -> Sequence[str]:
        try:
            async with asyncio.timeout(timeout_s):
                await self._hint.wait()
        except TimeoutError:
            return []
        if self._lost:
            raise DependencyUnavailable("Postgres: the connection was lost")
        self._hint.clear()
        hints, self._hints = self._hints, []
        return hints

    def hint(self, hint: str = "") -> None:
        self._hints.append(hint)
        self._hint.set()

    def lose(self) -> None:
        self._lost = True
        self._hint.set()


@dataclass
class Workers:
    """Receives tickets; each stays out until a test sets its outcome."""

    out: dict[AttemptRef, asyncio.Future[TicketOutcome]] = field(default_factory=dict)
    sent: Counter[AttemptRef] = field(default_factory=Counter)
    most_out: int = 0
    holds_s: list[float] = field(default_factory=list)
    refuse_with: Exception | None = None

    async def process(self, ref: AttemptRef, hold_s: float) -> TicketOutcome:
        assert ref not in self.out, "two tickets for one attempt"
        self.sent[ref] += 1
        self.holds_s.append(hold_s)
        if self.refuse_with is not None:
            raise self.refuse_with
        self.out[ref] = asyncio.get_running_loop().create_future()
        self.most_out = max(self.most_out, len(self.out))
        try:
            return await self.out[ref]
        finally:
            del self.out[ref]


@dataclass
class Bench:
    """A dispatcher on fakes. `tick_s` is so long that only hints and tickets make it look for
    work."""

    jobs: MemoryJobStore = field(default_factory=MemoryJobStore)
    signals: Signals = field(default_factory=Signals)
    workers: Workers = field(default_factory=Workers)
    lease_s: float = NEVER_S
    leading: asyncio.Task[None] | None = None

    def lead(self, tick_s: float = NEVER_S) -> asyncio.Task[None]:
        dispatch = Dispatch(
            self.jobs, self.signals, self.workers.process, WINDOW, self.lease_s, tick_s
        )
        self.leading = asyncio.create_task(dispatch.lead())
        return self.leading

    async def submit(self) -> AttemptRef:
        job, _ = await self.jobs.insert(new_job())
        self.signals.hint()
        return AttemptRef(job.id, 1)

    async def claim(self, lease_s: float = 60) -> Job:
        job = await self.jobs.claim("worker-1", lease_s, ["restore"])
        assert job is not None
        return job

    async def sent(self, *refs: AttemptRef) -> None:
        """Wait until exactly these tickets are out."""
        await until(lambda: set(self.workers.out) == set(refs))
