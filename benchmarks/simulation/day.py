"""Simulate one day under one policy: submissions, the leader's dispatching, and the fleet."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.dispatcher import Dispatch
from benchmarks.simulation.clock import SimulatedDatabase, SimulatedLoop
from benchmarks.simulation.fleet import LEASE_S, Fleet, Machines
from benchmarks.simulation.policies import Policy
from benchmarks.simulation.traffic import DAY_S, Photo, peak_workers
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.leadership import Leadership
from restoration.jobs import AttemptRef, Job, Priority
from restoration.scaling import Demand

# Submissions and ends of jobs wake the leader. Its own look at the queue, every second in
# production, would cost most of a simulated night and find nothing.
TICK_S = 60.0
SAMPLE_S = 60.0


class Hints(Leadership):
    """The leader's notifications in simulated time, in place of Postgres' NOTIFY."""

    def __init__(self) -> None:
        self._hint = asyncio.Event()

    async def wait(self, timeout_s: float) -> Sequence[str]:
        try:
            async with asyncio.timeout(timeout_s):
                await self._hint.wait()
        except TimeoutError:
            return []
        self._hint.clear()
        return [""]

    def hint(self) -> None:
        self._hint.set()


class QueueAsked(PostgresJobStore):
    """The leader's view of the queue. While `something_waits` is false it does not query Postgres,
    which saves half of the queries."""

    def __init__(self, database: Database, something_waits: Callable[[], bool]) -> None:
        super().__init__(database)
        self._something_waits = something_waits

    async def waiting(self, limit: int) -> Sequence[AttemptRef]:
        return await super().waiting(limit) if self._something_waits() else []

    async def expire(self) -> Sequence[Job]:
        return await super().expire() if self._something_waits() else []

    async def promote(self) -> None:
        if self._something_waits():
            await super().promote()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a day: waits in seconds from the jobs' rows, and paid nodes over time."""

    gpu_hours: float
    losses: int  # lost workers
    waits_s: Mapping[Priority, Sequence[float]]
    nodes: Sequence[tuple[float, int]]

    def p95_wait_s(self, priority: Priority) -> float:
        waits = sorted(self.waits_s[priority])
        return waits[math.ceil(0.95 * len(waits)) - 1]


def simulate(
    database_url: str,
    photos: Sequence[Photo],
    policy: Policy,
    machines: Machines,
    seed: int,
    until_s: float = DAY_S,
) -> Outcome:
    """Submit `photos` at their times; return when all have ended, but not before `until_s`."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(_simulate(database_url, photos, policy, machines, seed, until_s))


async def _simulate(
    database_url: str,
    photos: Sequence[Photo],
    policy: Policy,
    machines: Machines,
    seed: int,
    until_s: float,
) -> Outcome:
    database = SimulatedDatabase(database_url)
    try:
        jobs = PostgresJobStore(database)
        execute_s = {photo.job.id: photo.execute_s for photo in photos}
        fleet = Fleet(machines, jobs, execute_s, seed)
        return await _Day(database, jobs, photos, policy, fleet).run(until_s)
    finally:
        await database.aclose()


class _Day:
    def __init__(
        self,
        database: Database,
        jobs: PostgresJobStore,
        photos: Sequence[Photo],
        policy: Policy,
        fleet: Fleet,
    ) -> None:
        self._queue = QueueAsked(database, lambda: self._waiting() > 0)
        self._jobs = jobs
        self._photos = photos
        self._policy = policy
        self._fleet = fleet
        self._clock = asyncio.get_running_loop().time
        self._submitted: Counter[Priority] = Counter()
        self._nodes: list[tuple[float, int]] = []

    async def run(self, until_s: float) -> Outcome:
        hints = Hints()
        window = 2 * peak_workers(self._photos) + 8  # as in `serve_app.deployment`
        dispatch = Dispatch(self._queue, hints, self._fleet.process, window, LEASE_S, TICK_S)
        async with asyncio.TaskGroup() as group:
            others = [
                group.create_task(work) for work in (dispatch.lead(), self._scale(), self._sample())
            ]
            await self._submit(hints)
            while self._fleet.ended.total() < len(self._photos):  # noqa: ASYNC110 - costs nothing
                await asyncio.sleep(SAMPLE_S)
            await asyncio.sleep(max(0.0, until_s - self._clock()))
            for task in others:
                task.cancel()
        await self._fleet.aclose()
        return Outcome(
            self._fleet.gpu_hours(self._clock()),
            self._fleet.losses,
            self._fleet.waits_s,
            self._nodes,
        )

    async def _submit(self, hints: Hints) -> None:
        for photo in self._photos:
            await asyncio.sleep(photo.at_s - self._clock())
            await self._jobs.insert(photo.job)
            self._submitted[photo.job.options.priority] += 1
            hints.hint()

    async def _scale(self) -> None:
        while True:
            fleet = self._fleet
            wanted = self._policy.decide(self._demand(), fleet.target, fleet.ready, self._clock())
            fleet.scale_to(wanted)
            await asyncio.sleep(self._policy.every_s)

    def _waiting(self, *priorities: Priority) -> int:
        """Return the number of waiting jobs of these classes, or of all."""
        fleet = self._fleet
        return sum(
            self._submitted[each] - fleet.ended[each] - fleet.running[each]
            for each in priorities or Priority
        )

    def _demand(self) -> Demand:
        interactive, running = Priority.INTERACTIVE, self._fleet.running
        return Demand(
            self._waiting(), running.total(), self._waiting(interactive), running[interactive]
        )

    async def _sample(self) -> None:
        while True:
            self._nodes.append((self._clock(), self._fleet.paid_nodes))
            await asyncio.sleep(SAMPLE_S)
