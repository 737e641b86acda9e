"""Simulated machines: nodes that start, idle and are lost, with a worker on each.

A worker claims with the real claim, prefers loaded models by the real rule, and takes as long for a
job as the traffic says. All its waiting passes on the loop's clock.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from ray.exceptions import ActorDiedError

from actors.execution.pipeline import TicketOutcome
from benchmarks.simulation.traffic import DAY_S, HOUR_S, WORKFLOWS
from persistence.postgres.jobs import PostgresJobStore
from restoration.affinity import Affinity
from restoration.jobs import Artifact, Job, Priority

# A lost worker raises the error of a dead Ray actor, so that no lease needs to lapse.
LEASE_S = 10.0 * DAY_S
RESULT = Artifact("outputs/simulated.png", "0" * 64, 1, "image/png")
WARM_UP_WORKFLOW = "restore"


@dataclass(frozen=True, slots=True)
class Machines:
    """Durations in seconds; docs/simulation.md gives the source of each."""

    node_start_s: float = 150.0
    engine_start_s: float = 15.0
    model_load_s: float = 8.0
    idle_timeout_s: float = 120.0
    lost_every_s: float = 12.0 * HOUR_S  # mean time until a spot node is lost


@dataclass
class Node:
    """One GPU node, paid for from its request until it is given back or lost."""

    asked_at_s: float
    lost_at_s: float
    gone_at_s: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def gone(self) -> bool:
        return self.gone_at_s is not None

    def paid_s(self, until_s: float) -> float:
        end_s = until_s if self.gone_at_s is None else min(self.gone_at_s, until_s)
        return max(0.0, end_s - self.asked_at_s)


@dataclass(eq=False)
class Worker:
    id: str
    node: Node
    ready: bool = False
    busy: bool = False
    leaving: bool = False
    affinity: Affinity = field(
        default_factory=lambda: Affinity(workflows=frozenset({WARM_UP_WORKFLOW}))
    )


class Fleet:
    """Approaches the requested number of workers, and processes tickets meanwhile."""

    def __init__(
        self,
        machines: Machines,
        jobs: PostgresJobStore,
        execute_s: Mapping[UUID, float],
        seed: int,
    ) -> None:
        self._machines = machines
        self._jobs = jobs
        self._execute_s = execute_s
        self._chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self._clock = asyncio.get_running_loop().time
        self._free: asyncio.Queue[Worker] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_nodes: list[Node] = []
        self._made = 0
        self.nodes: list[Node] = []
        self.workers: list[Worker] = []
        self.losses = 0
        self.running: Counter[Priority] = Counter()
        self.ended: Counter[Priority] = Counter()
        self.waits_s: dict[Priority, list[float]] = {priority: [] for priority in Priority}

    @property
    def target(self) -> int:
        return len(self.workers)

    @property
    def ready(self) -> int:
        return sum(worker.ready for worker in self.workers)

    @property
    def paid_nodes(self) -> int:
        return sum(not node.gone for node in self.nodes)

    def gpu_hours(self, until_s: float) -> float:
        return sum(node.paid_s(until_s) for node in self.nodes) / HOUR_S

    def scale_to(self, workers: int) -> None:
        """Set the number of workers. As in Serve, the newest leave first, after their current
        job."""
        while len(self.workers) < workers:
            self._hire()
        while len(self.workers) > workers:
            self._let_go(self.workers.pop())

    async def process(self, _ticket: object, _hold_s: float) -> TicketOutcome:
        """Process a ticket like a Serve handle: wait for a free worker, and then for its work."""
        while (worker := await self._free.get()).leaving or worker.node.gone:
            pass
        worker.busy = True
        try:
            async with asyncio.timeout_at(worker.node.lost_at_s):
                return await self._work(worker)
        except TimeoutError:
            raise _death(worker) from None
        finally:
            worker.busy = False
            if worker.leaving:
                self._give_up(worker.node)
            elif not worker.node.gone:
                self._free.put_nowait(worker)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, worker: Worker) -> TicketOutcome:
        job = await self._jobs.claim(worker.id, LEASE_S, list(WORKFLOWS), worker.affinity)
        if job is None:
            return TicketOutcome.NOTHING_CLAIMED
        if job.attempt == 1 and job.started_at is not None:
            waited_s = (job.started_at - job.created_at).total_seconds()
            self.waits_s[job.options.priority].append(waited_s)
        self.running[job.options.priority] += 1
        try:
            await self._execute(worker, job)
        finally:
            self.running[job.options.priority] -= 1
        self.ended[job.options.priority] += 1
        return TicketOutcome.RAN

    async def _execute(self, worker: Worker, job: Job) -> None:
        if job.workflow not in worker.affinity.workflows:
            await asyncio.sleep(self._machines.model_load_s)
            worker.affinity.workflows = frozenset({job.workflow})
        await asyncio.sleep(self._execute_s[job.id])
        await self._jobs.succeed(job.ref, RESULT, {})

    def _hire(self) -> None:
        self._made += 1
        reused = bool(self._idle_nodes)
        node = self._idle_nodes.pop() if reused else self._ask_for_node()
        node.changed.set()
        worker = Worker(f"worker-{self._made}", node)
        self._spawn(self._start(worker, 0.0 if reused else self._machines.node_start_s))
        self.workers.append(worker)

    def _ask_for_node(self) -> Node:
        now_s = self._clock()
        lost_at_s = now_s + self._chance.expovariate(1 / self._machines.lost_every_s)
        node = Node(now_s, lost_at_s)
        self.nodes.append(node)
        self._spawn(self._lose(node))
        return node

    async def _start(self, worker: Worker, node_start_s: float) -> None:
        machines = self._machines
        await asyncio.sleep(node_start_s + machines.engine_start_s + machines.model_load_s)
        if not worker.leaving and not worker.node.gone:
            worker.ready = True
            self._free.put_nowait(worker)

    def _let_go(self, worker: Worker) -> None:
        worker.leaving = True
        if not worker.busy:
            self._give_up(worker.node)

    def _give_up(self, node: Node) -> None:
        """Keep the node for the idle timeout, and give it back unless a worker needs it."""
        if not node.gone:
            node.changed.clear()
            self._idle_nodes.append(node)
            self._spawn(self._give_back(node))

    async def _give_back(self, node: Node) -> None:
        try:
            async with asyncio.timeout(self._machines.idle_timeout_s):
                await node.changed.wait()
        except TimeoutError:
            self._remove(node)

    async def _lose(self, node: Node) -> None:
        """Take a spot node away at its time; Serve asks for another worker at once."""
        await asyncio.sleep(node.lost_at_s - self._clock())
        if node.gone:
            return
        self._remove(node)
        for worker in [each for each in self.workers if each.node is node]:
            self.losses += 1
            self.workers.remove(worker)
            self._hire()

    def _remove(self, node: Node) -> None:
        node.gone_at_s = self._clock()
        node.changed.set()
        if node in self._idle_nodes:
            self._idle_nodes.remove(node)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _death(worker: Worker) -> ActorDiedError:
    death = ActorDiedError()
    death.actor_id = worker.id
    return death
