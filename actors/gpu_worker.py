"""A GPU worker: one Serve replica, one GPU, one ComfyUI.

For each ticket it claims the best waiting job and runs it to the end of its attempt, with several
jobs in different stages at a time (`actors.execution.pipeline`). A job outlives its ticket: neither
a dispatcher that dies nor a cancelled ticket stops work.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import AsyncExitStack

import ray
import structlog
from opentelemetry import trace

from actors.cluster.replica import is_draining
from actors.execution.attempt import EngineOccupancy, Execution, Lease
from actors.execution.engine_metrics import EngineWatch
from actors.execution.loaded_models import LoadedModels
from actors.execution.pipeline import BUSY, STORING, Pipeline, one_after_another
from actors.execution.registration import WorkerRegistration
from actors.execution.usage import UsageRecorder
from actors.images.process_pool import ImageProcessPool
from actors.observability.logging import configure_logging
from actors.observability.metrics import RayMeter
from actors.observability.observers import MetricsObserver, Observers
from actors.observability.tracing import SpanObserver, tracer_provider
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
# The engine has priority over image processes: an idle GPU costs more than a waiting picture.
IMAGE_NICENESS = 5

log = structlog.get_logger(__name__)


class GpuWorker:
    """The Serve deployment. Secrets come from the node's environment, never from arguments."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, *, whole_gpu: bool, depth: int, drain_s: float
    ) -> None:
        """`depth`: jobs made ready behind the executing one. `drain_s`: Serve's shutdown timeout.

        `whole_gpu`: the worker has its GPU to itself.
        """
        self._ready = False
        os.umask(0o077)  # only this account may read files of photos
        settings = load_settings(os.environ)
        configure_logging(settings.log_format)
        trace.set_tracer_provider(tracer_provider(settings.otlp_endpoint, "worker"))
        self._id = str(ray.get_runtime_context().get_actor_id())
        self._lease = Lease(settings.heartbeat_s, settings.lease_s)
        self._pipeline = Pipeline(self._claim, self._see_through, depth)
        self._ask_store_first = False
        self._running: set[asyncio.Task[str]] = set()
        self._held: dict[AttemptRef, tuple[Job, EngineOccupancy]] = {}
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
        """Open the worker's clients, engine and image processes; `resources` closes them."""
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
        self._warmth = LoadedModels(catalog, self._engine)
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
            observer=Observers(MetricsObserver(meter), SpanObserver()),
        )
        registry = PostgresWorkerRegistry(database)
        self._standing = WorkerRegistration(
            registry, self._report, self._restart_engine, settings.heartbeat_s
        )
        await self._standing.report()  # fetches the orders before the first ticket arrives

    async def process(self, job_id: str, attempt: int, hold_s: float) -> str:
        """Run the best waiting job, which need not be the ticket's, then others while some wait.

        Return the last job's status, "lost" if its lease was lost, NOTHING_WAITS if there was
        nothing to claim, or BUSY if the worker could not claim within `hold_s` seconds.
        """
        affinity = self._warmth.affinity
        return await one_after_another(self._process, hold_s, lambda: affinity.others_waited)

    async def _process(self, hold_s: float) -> str:
        if not await self._standing.admitted(hold_s):
            return BUSY
        # Shielded: a ticket is cancelled when its dispatcher stops, and its job must go on.
        task = asyncio.create_task(self._pipeline.process(hold_s))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._pipeline.withdraw(task)
            raise

    async def _claim(self) -> Job | None:
        """Claim the best waiting job once the engine runs and, after a failure, S3 answers.

        Return None if no job waits, the engine does not start, or the worker drains; tickets may
        still arrive after the drain began.
        """
        if self._is_to_stop():
            return None
        if self._ask_store_first:
            await self._stores_answer()
        try:
            await self._engine.start()  # before the claim, so that no lease runs meanwhile
        except EngineUnavailable as error:
            log.warning("engine_unavailable", reason=error.message)
            return None
        if self._is_to_stop():  # the drain may have begun during the waits above
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

    async def _see_through(self, job: Job, visit: EngineOccupancy) -> str:
        self._held[job.ref] = job, visit
        try:
            ended = await self._execution.run(job, visit)
        finally:
            del self._held[job.ref]
        if ended is not None and ended.status is JobStatus.QUEUED:
            self._ask_store_first = True  # the attempt may have failed because S3 is unavailable
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
        """Wait until S3 responds, so that an outage does not cost every job an attempt here."""
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
        """Wait until Serve drains the replica, and release unfinished jobs before it kills it."""
        while not is_draining():  # noqa: ASYNC110 # Serve has a flag for it and no event
            await asyncio.sleep(DRAIN_POLL_S)
        log.info("worker_drains", worker=self._id, jobs_in_hand=len(self._held))
        await asyncio.sleep(drain_s - min(HAND_BACK_S, drain_s / 2))
        await self._hand_back()

    async def _hand_back(self) -> None:
        """Release all jobs, then stop them; an engine may take long to reach its next step."""
        for ref in tuple(self._held):
            try:
                await self._jobs.release(ref, None)
            except (LeaseLost, DependencyUnavailable) as error:
                log.warning("not_handed_back", job_id=str(ref.job_id), reason=error.message)
        await stop(*self._running)

    async def check_health(self) -> None:
        """Restart a dead engine between jobs, or raise, so that Serve replaces the replica."""
        if (error := self._engine.broken) is not None:
            raise error  # also while a job waits for the engine to start
        for task in self._background:
            if task.done():
                task.result()  # without them reports, usage records or progress would be missing
        if self._pipeline.idle and not await self._engine.healthy():
            await self._engine.start()

    async def __del__(self) -> None:
        """Release running jobs and stop the engine, after Serve has drained the replica."""
        if not self._ready:
            return  # __init__ failed, and has closed the resources it had opened
        await stop(*self._background)
        await self._hand_back()
        await self._standing.leave()
        await self._resources.aclose()
