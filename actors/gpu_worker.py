"""A GPU worker: one Serve replica, one GPU, one ComfyUI.

It takes tickets, claims the best job that waits by then, and sees it through, several of them in
different stages at a time (`actors.execution.pipeline`). The job outlives the ticket: a dispatcher
that dies, or a ticket that is cancelled, stops no work.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import AsyncExitStack

import ray
import structlog

from actors.cluster.replica import is_draining
from actors.execution.attempt import Execution, Lease, Visit
from actors.execution.engine_metrics import EngineWatch
from actors.execution.loaded_models import Warmth
from actors.execution.pipeline import BUSY, STORING, Pipeline, one_after_another
from actors.execution.registration import WorkerRegistration
from actors.execution.usage import UsageRecorder
from actors.images.process_pool import ImageProcessPool
from actors.observability.logging import configure_logging
from actors.observability.metrics import RayMeter
from actors.observability.observers import Measured, Observers
from actors.observability.spans import Traced, tracer_from
from actors.status_actor import ProgressReporter, status_actor
from comfy_pool.factory import engine_on_this_node
from persistence.objects.redis_cache import open_blobs
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.usage import PostgresUsageLedger
from persistence.postgres.workers import PostgresWorkerRegistry
from persistence.redis.status import RedisStatusBoard
from restoration.errors import DependencyUnavailable, EngineUnavailable, LeaseLost
from restoration.jobs import AttemptRef, Job, JobStatus
from restoration.queue_policy import versioned
from restoration.settings import Settings, load_settings
from restoration.tasks import stop
from restoration.workers import EngineState, JobInHand, WorkerReport
from workflows.catalog import Catalog, load_catalog
from workflows.manifest import CUSTOM

STORE_PAUSE_S = 0.2
LONGEST_STORE_PAUSE_S = 5.0
DRAIN_POLL_S = 0.5
HAND_BACK_S = 5.0
# Engines go first: a GPU that waits costs more than a picture that does.
IMAGE_NICENESS = 5

log = structlog.get_logger(__name__)


class GpuWorker:
    """The Serve deployment. Secrets come from the node's environment, never from arguments."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, *, whole_gpu: bool, depth: int, drain_s: float
    ) -> None:
        """`drain_s` is how long Serve lets a replica that is to stop go on."""
        self._ready = False
        os.umask(0o077)  # files of photos are for this account alone
        settings = load_settings(os.environ)
        configure_logging(settings.log_format)
        self._id = str(ray.get_runtime_context().get_actor_id())
        self._lease = Lease(settings.heartbeat_s, settings.lease_s)
        self._pipeline = Pipeline(self._claim, self._see_through, depth)
        self._ask_store_first = False
        self._running: set[asyncio.Task[str]] = set()
        self._held: dict[AttemptRef, tuple[Job, Visit]] = {}
        catalog = load_catalog(more=settings.workflows_dir)
        self._workflows = [
            CUSTOM,
            *(versioned(each.name, each.version) for each in catalog.versions()),
        ]
        async with AsyncExitStack() as resources:
            await self._open(resources, settings, catalog, whole_gpu=whole_gpu)
            self._resources = resources.pop_all()
        self._background = [
            asyncio.create_task(each)
            for each in (
                *(self._standing.run(), self._costs.run(), self._progress.run()),
                *(self._watching.run(), self._leave_in_time(drain_s)),
            )
        ]
        self._ready = True
        log.info("worker_ready", worker=self._id)

    async def _open(
        self, resources: AsyncExitStack, settings: Settings, catalog: Catalog, *, whole_gpu: bool
    ) -> None:
        """What the worker works with; `resources` closes all of it, the last first."""
        database = Database(settings.database_url.get_secret_value())
        resources.push_async_callback(database.aclose)
        self._blobs = blobs = open_blobs(settings, resources)
        board = RedisStatusBoard(settings.redis_url.get_secret_value())
        resources.push_async_callback(board.aclose)
        self._progress = ProgressReporter(status_actor(), board)
        resources.push_async_callback(self._progress.aclose)
        self._engine = await resources.enter_async_context(
            engine_on_this_node(settings, catalog, ray.get_gpu_ids(), whole_gpu=whole_gpu)
        )
        meter = RayMeter()
        self._watching = EngineWatch(self._engine, meter)
        images = await resources.enter_async_context(
            ImageProcessPool(
                settings.upload_limits,
                processes=1 + STORING,
                cpu_s=settings.image_cpu_s,
                niceness=IMAGE_NICENESS,
            )
        )
        self._warmth = Warmth(catalog, self._engine)
        if settings.warm_up_workflow:
            await self._warmth.warm_up(settings.warm_up_workflow)
        self._jobs = PostgresJobStore(database, settings.queue_policy)
        self._costs = UsageRecorder(PostgresUsageLedger(database), settings.heartbeat_s)
        resources.push_async_callback(self._costs.write)
        self._execution = Execution(
            catalog,
            self._jobs,
            blobs,
            self._engine,
            images,
            self._progress,
            self._lease,
            charge=self._costs.charge,
            observer=Observers(Measured(meter), Traced(tracer_from(settings, "worker"))),
        )
        registry = PostgresWorkerRegistry(database)
        self._standing = WorkerRegistration(
            registry, self._report, self._restart_engine, settings.heartbeat_s
        )
        await self._standing.report()  # and know what was ordered before the first ticket

    async def process(self, job_id: str, attempt: int, hold_s: float) -> str:
        """Honour a ticket: run the best waiting job, which need not be the ticket's own, and then
        those that are the best by then.

        A ticket that could not be used within `hold_s` goes back.
        """
        affinity = self._warmth.affinity
        return await one_after_another(self._process, hold_s, lambda: affinity.others_waited)

    async def _process(self, hold_s: float) -> str:
        if not await self._standing.admitted(hold_s):
            return BUSY
        # A ticket is cancelled when its dispatcher goes: that is no reason to stop a job.
        task = asyncio.create_task(self._pipeline.process(hold_s))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._pipeline.withdraw(task)
            raise

    async def _claim(self) -> Job | None:
        """The best waiting job, if there is an engine for it and a store to read it from; none
        when the worker is to have no more, which tickets that came before may not know."""
        if self._is_to_stop():
            return None
        if self._ask_store_first:
            await self._stores_answer()
        try:
            await self._engine.start()  # before a job is claimed for it, not under one
        except EngineUnavailable as error:
            log.warning("engine_unavailable", reason=error.message)
            return None
        if self._is_to_stop():  # it may have been told so while it waited
            return None
        self._warmth.check()
        job = await self._jobs.claim(
            self._id, self._lease.lease_s, self._workflows, self._warmth.affinity
        )
        if job is not None:
            self._warmth.took(job.workflow)
        return job

    def _is_to_stop(self) -> bool:
        return is_draining() or self._standing.drained

    async def _see_through(self, job: Job, visit: Visit) -> str:
        self._held[job.ref] = job, visit
        try:
            ended = await self._execution.run(job, visit)
        finally:
            del self._held[job.ref]
        if ended is not None and ended.status is JobStatus.QUEUED:
            self._ask_store_first = True  # it may have been handed back because of S3
        return ended.status if ended else "lost"

    def _report(self, restarts_done: int) -> WorkerReport:
        state = EngineState.READY if self._engine.alive else EngineState.DOWN
        if self._engine.broken is not None:
            state = EngineState.BROKEN
        in_hand = (
            JobInHand(job.id, job.workflow, visit.stage, job.started_at)
            for job, visit in self._held.values()
            if job.started_at is not None
        )
        return WorkerReport(
            id=self._id,
            node=socket.gethostname(),
            engine_url=self._engine.url,
            engine=state,
            engine_starts=self._engine.starts,
            in_hand=tuple(in_hand),
            restarts_done=restarts_done,
            engine_version=self._engine.version,
        )

    async def _restart_engine(self) -> None:
        self._engine.retire()
        await self._engine.start()

    async def _stores_answer(self) -> None:
        """Wait until S3 is there again: an outage must not send every job through here and back."""
        pause_s = STORE_PAUSE_S
        while True:
            try:
                await self._blobs.ping()
                self._ask_store_first = False
                return
            except DependencyUnavailable as error:
                log.warning("store_unavailable", reason=error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_STORE_PAUSE_S)

    async def _leave_in_time(self, drain_s: float) -> None:
        """Once the replica is to stop: hand back what has not ended shortly before it is killed."""
        while not is_draining():  # noqa: ASYNC110 # a flag of Serve's, which has no event
            await asyncio.sleep(DRAIN_POLL_S)
        log.info("worker_drains", worker=self._id, jobs_in_hand=len(self._held))
        await asyncio.sleep(drain_s - min(HAND_BACK_S, drain_s / 2))
        await self._hand_back()

    async def _hand_back(self) -> None:
        """Give up all jobs, and only then stop them: an engine may take long to its next step."""
        for ref in tuple(self._held):
            try:
                await self._jobs.release(ref, None)
            except (LeaseLost, DependencyUnavailable) as error:
                log.warning("not_handed_back", job_id=str(ref.job_id), reason=error.message)
        await stop(*self._running)

    async def check_health(self) -> None:
        """Bring a dead engine back between jobs; raise, to be replaced, if that cannot be done."""
        if (error := self._engine.broken) is not None:
            raise error  # also while a job waits for it to start
        for task in self._background:
            if task.done():
                task.result()  # a worker that cannot be reached, or that works unpaid, is no good
        if self._pipeline.idle and not await self._engine.healthy():
            await self._engine.start()

    async def __del__(self) -> None:
        """Hand back what runs, and stop the engine. Serve has drained the replica before."""
        if not self._ready:
            return  # stopped while it started, which closes what it had opened
        await stop(*self._background)
        await self._hand_back()
        await self._standing.leave()
        await self._resources.aclose()
