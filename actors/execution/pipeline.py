"""A worker's pipeline: while one job executes, the next is fetched and the previous one is stored.

A job is claimed late, just in time to be ready when the engine finishes the work ahead of it. Until
then an idle worker may claim it, and a more urgent job may overtake it. Plain async code, no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import StrEnum

import structlog

from actors.execution.engine_schedule import EngineOccupancy, EngineSchedule
from actors.execution.loaded_models import LoadedModels
from restoration.engine_port import Engine
from restoration.errors import DependencyUnavailable, EngineUnavailable, LeaseLost
from restoration.jobs import AttemptRef, Job, JobStatus
from restoration.ports.jobs import WorkerQueue
from restoration.ports.objects import BlobStore
from restoration.tasks import stop
from restoration.workers import JobInHand

# Jobs that may be encoded and stored at a time: one for each image process that encodes.
STORING = 2
# A ticket that has already run a job may wait longer, because no other worker needs it.
_SERVED_HOLD_S = 5.0
_STORE_PAUSE_S = 0.2
_LONGEST_STORE_PAUSE_S = 5.0

log = structlog.get_logger(__name__)

Run = Callable[[Job, EngineOccupancy], Awaitable[Job | None]]  # `Execution.run`
Release = Callable[[Job], Awaitable[None]]  # `Execution.release`


class TicketOutcome(StrEnum):
    RAN = "ran"  # the worker ran at least one job
    NOTHING_CLAIMED = "nothing claimed"  # no job waits that this worker can run
    BUSY = "busy"  # the worker could not claim soon enough; another may be idle


def stages(depth: int) -> int:
    """Return the number of tickets a worker uses at a time, for its `max_ongoing_requests`."""
    return 1 + depth + STORING


class Pipeline:
    """Claims and runs jobs, with up to `depth` made ready behind the one that executes.

    It claims jobs of `workflows`, under the id `worker`, only while `undrained` is set and
    `is_stopping` returns False.
    """

    def __init__(
        self,
        *,
        worker: str,
        workflows: Sequence[str],
        jobs: WorkerQueue,
        blobs: BlobStore,
        engine: Engine,
        loaded_models: LoadedModels,
        run: Run,
        release: Release,
        lease_s: float,
        depth: int,
        undrained: asyncio.Event,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._worker = worker
        self._workflows = workflows
        self._jobs = jobs
        self._blobs = blobs
        self._engine = engine
        self._loaded_models = loaded_models
        self._run = run
        self._release = release
        self._lease_s = lease_s
        self._undrained = undrained
        self._is_stopping = is_stopping
        self._stages = asyncio.Semaphore(stages(depth))
        self._schedule = EngineSchedule(1 + depth)
        self._claiming = asyncio.Lock()
        self._store_may_be_away = False
        self._running: set[asyncio.Task[TicketOutcome]] = set()
        self._held: dict[AttemptRef, tuple[Job, EngineOccupancy]] = {}

    @property
    def idle(self) -> bool:
        """Return whether no claimed job is in the engine or on its way to it."""
        return self._schedule.empty

    @property
    def in_hand(self) -> tuple[JobInHand, ...]:
        """The claimed jobs that have not ended, with their stages."""
        return tuple(
            JobInHand(job.id, job.workflow, occupancy.stage, job.started_at)
            for job, occupancy in self._held.values()
            if job.started_at is not None
        )

    async def process(self, hold_s: float) -> TicketOutcome:
        """Run the best waiting job, then others while some wait: a claim costs less than a ticket.

        Return BUSY if no job could be claimed within `hold_s` seconds. If the caller is cancelled,
        a job that is being claimed or runs goes on.
        """
        outcome = await self._process_one(hold_s)
        if outcome is TicketOutcome.RAN:
            # The latest claim of any ticket has set it; a claim too many costs one empty query.
            while self._loaded_models.affinity.others_waited:
                if await self._process_one(_SERVED_HOLD_S) is not TicketOutcome.RAN:
                    break
        return outcome

    async def hand_back(self) -> None:
        """Release all jobs, then stop them; an engine may take long to reach its next step."""
        for job, _ in tuple(self._held.values()):
            try:
                await self._release(job)
            except (LeaseLost, DependencyUnavailable) as error:
                log.warning("not_handed_back", job_id=str(job.id), reason=error.message)
        await stop(*self._running)

    async def _process_one(self, hold_s: float) -> TicketOutcome:
        # A ticket is cancelled when its dispatcher stops, and its job must go on. So the job has a
        # task of its own, which a cancelled ticket cancels only before it claims.
        claims = asyncio.Event()
        task = asyncio.create_task(self._claim_and_run(hold_s, claims))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not claims.is_set():
                task.cancel()
            raise

    async def _claim_and_run(self, hold_s: float, claims: asyncio.Event) -> TicketOutcome:
        try:
            async with asyncio.timeout(hold_s) as hold, self._stages:
                async with self._schedule.occupancy() as occupancy:
                    async with self._claiming:
                        await self._undrained.wait()
                        await self._schedule.nearly_free()
                        hold.reschedule(None)  # from here on the ticket cannot be given back
                        claims.set()
                        if (job := await self._claim()) is None:
                            return TicketOutcome.NOTHING_CLAIMED
                        occupancy.claimed(job.workflow)
                    await self._run_held(job, occupancy)
                    return TicketOutcome.RAN
        except TimeoutError:
            if hold.expired():
                return TicketOutcome.BUSY
            raise

    async def _claim(self) -> Job | None:
        """Claim the best waiting job once the engine runs and, after a failure, S3 answers.

        Return None if no job waits, the engine does not start, or the worker is told to stop.
        """
        if self._store_may_be_away:
            await self._wait_for_store()
        if not self._may_claim():  # tickets may still arrive after the drain began
            return None
        try:
            await self._engine.start()  # before the claim, so that no lease runs meanwhile
        except EngineUnavailable as error:
            log.warning("engine_unavailable", reason=error.message)
            return None
        if not self._may_claim():  # the drain may have begun during the waits above
            return None
        self._loaded_models.forget_if_restarted()
        claiming = asyncio.ensure_future(
            self._jobs.claim(
                self._worker, self._lease_s, self._workflows, self._loaded_models.affinity
            )
        )
        try:
            job = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # A claim that has begun commits, and nothing would run the job until its lease expires.
            await asyncio.wait({claiming})
            with suppress(LeaseLost, DependencyUnavailable):
                if (job := claiming.result()) is not None:
                    await self._jobs.release(job.ref, None)
            raise
        if job is not None:
            self._loaded_models.will_run(job.workflow)
        return job

    async def _run_held(self, job: Job, occupancy: EngineOccupancy) -> None:
        self._held[job.ref] = job, occupancy
        try:
            ended = await self._run(job, occupancy)
        finally:
            del self._held[job.ref]
        if ended is not None and ended.status is JobStatus.QUEUED:
            self._store_may_be_away = True  # which may be why the attempt failed

    def _may_claim(self) -> bool:
        return self._undrained.is_set() and not self._is_stopping()

    async def _wait_for_store(self) -> None:
        """Wait until S3 answers, so that an outage does not cost every job an attempt here.

        Return at once if the worker is told to stop.
        """
        pause_s = _STORE_PAUSE_S
        while self._may_claim():
            try:
                await self._blobs.ping()
            except DependencyUnavailable as error:
                log.warning("store_unavailable", reason=error.message)
            else:
                self._store_may_be_away = False
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_STORE_PAUSE_S)
