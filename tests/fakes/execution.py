"""An execution on in-memory stores and an in-memory engine that count calls and can hold runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from actors.execution.attempt import Execution, Images, Lease
from actors.execution.engine_schedule import EngineOccupancy
from actors.execution.outcomes import RetryPolicy
from actors.observability.timings import Stopwatch
from restoration.events import JobEvent, StateChanged
from restoration.jobs import Artifact, AttemptRef, Failure, Job, JobStatus
from tests.fakes.engine import MemoryEngine
from tests.fakes.images import ImagesHere
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.site import photo
from tests.fakes.stores import MemoryBlobStore
from tests.support.samples import new_job
from workflows.catalog import Catalog, load_catalog

DEADLINE_S = 300
LEASE = Lease(heartbeat_s=0.01, lease_s=60)
RETRY = RetryPolicy(first_s=0.01, longest_s=0.02, record_s=DEADLINE_S)
NOW = datetime(2030, 1, 1, tzinfo=UTC)
RESULT = photo((32, 32))


@dataclass
class Jobs(MemoryJobStore):
    """A job store that counts calls, also while it is down."""

    beats: int = 0
    writes: int = 0
    releases: int = 0

    async def heartbeat(self, ref: AttemptRef, lease_s: float) -> JobStatus:
        self.beats += 1
        return await super().heartbeat(ref, lease_s)

    async def succeed(self, ref: AttemptRef, output: Artifact, timings_s: Any) -> Job:
        self.writes += 1
        return await super().succeed(ref, output, timings_s)

    async def release(
        self,
        ref: AttemptRef,
        failure: Failure | None,
        delay_s: float = 0,
        *,
        charged: bool = True,
    ) -> Job:
        self.releases += 1
        return await super().release(ref, failure, delay_s, charged=charged)


@dataclass
class Occupancy(EngineOccupancy):
    """Records the calls of an execution, in order."""

    told: list[str] = field(default_factory=list)

    def staged(self, pixels: int) -> None:
        self.told.append(f"staged {pixels}")

    def began(self) -> None:
        self.told.append("began")

    def finished(self) -> None:
        self.told.append("finished")


@dataclass
class Bench:
    """An execution on fakes, with the events that it published."""

    catalog: Catalog = field(default_factory=load_catalog)
    retry: RetryPolicy = RETRY
    jobs: Jobs = field(default_factory=lambda: Jobs(clock=lambda: NOW))
    blobs: MemoryBlobStore = field(default_factory=MemoryBlobStore)
    engine: MemoryEngine = field(default_factory=lambda: MemoryEngine(RESULT))
    images: Images = field(default_factory=ImagesHere)
    events: list[tuple[UUID, JobEvent]] = field(default_factory=list)
    told_rows: list[Job] = field(default_factory=list)
    occupancy: Occupancy = field(default_factory=Occupancy)
    ends: list[Job | None] = field(default_factory=list)  # as an observer learned them

    async def claimed(self, image: bytes | None = None, **changes: Any) -> Job:
        stored = await self.blobs.put("inputs/1.png", image or photo(), "image/png")
        params = self.catalog.find("restore").resolve(changes.pop("params", {}))
        await self.jobs.insert(new_job(input=stored, params=params, **changes))
        job = await self.jobs.claim("worker-1", LEASE.lease_s, ["restore"])
        assert job is not None
        return job

    @cached_property
    def execution(self) -> Execution:
        def publish(job_id: UUID, event: JobEvent, row: Job | None = None, /) -> None:
            self.events.append((job_id, event))
            self.told_rows += [] if row is None else [row]

        return Execution(
            self.catalog,
            self.jobs,
            self.blobs,
            self.engine,
            self.images,
            publish,
            LEASE,
            self.retry,
            self,
        )

    def executed(self, job: Job, gpu_s: float, more_s: float) -> None: ...

    def ended(self, job: Job, watch: Stopwatch, ended: Job | None) -> None:
        self.ends.append(ended)

    async def run(self, job: Job) -> Job | None:
        async with asyncio.timeout(DEADLINE_S):
            return await self.execution.run(job, self.occupancy)

    async def start(self, job: Job) -> asyncio.Task[Job | None]:
        """Run the job until the engine holds it."""
        self.engine.go_on.clear()
        task = asyncio.create_task(self.run(job))
        async with asyncio.timeout(DEADLINE_S):
            await self.engine.running.wait()
        return task

    def row(self, job: Job) -> Job:
        return self.jobs.rows[job.id]

    def states(self) -> list[JobStatus]:
        return [event.status for _, event in self.events if isinstance(event, StateChanged)]

    def outputs(self) -> list[str]:
        return [key for key in self.blobs.objects if key.startswith("outputs/")]


@asynccontextmanager
async def open_bench() -> AsyncIterator[Bench]:
    """Yield a bench, and assert that no task, such as a heartbeat, outlives the test."""
    before = asyncio.all_tasks()
    yield Bench()
    assert asyncio.all_tasks() - before <= {asyncio.current_task()}
