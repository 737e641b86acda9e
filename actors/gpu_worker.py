"""A GPU worker: one Serve replica, one GPU, one ComfyUI.

For each ticket its pipeline (`actors.execution.pipeline`) claims the best waiting job and runs it
to the end of its attempt. A job outlives its ticket: neither a dispatcher that dies nor a cancelled
ticket stops work.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

import ray
import structlog
from opentelemetry import trace

from actors.cluster.replica import is_draining
from actors.execution.attempt import Execution, Lease
from actors.execution.engine_metrics import EngineMetrics
from actors.execution.loaded_models import LoadedModels
from actors.execution.pipeline import STORING, Pipeline, TicketOutcome
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
from restoration.ports.jobs import WorkerQueue
from restoration.ports.objects import BlobStore
from restoration.queue_policy import versioned
from restoration.settings import Settings, load_settings
from restoration.tasks import stop
from restoration.workers import EngineState, WorkerReport
from workflows.catalog import Catalog, load_catalog
from workflows.manifest import CUSTOM

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
        self._resources = AsyncExitStack()  # stays empty if the start fails
        self._background: list[asyncio.Task[None]] = []
        os.umask(0o077)  # only this account may read files of photos
        settings = load_settings(os.environ)
        configure_logging(settings.log_format)
        trace.set_tracer_provider(tracer_provider(settings.otlp_endpoint, "worker"))
        self._id = str(ray.get_runtime_context().get_actor_id())
        async with AsyncExitStack() as resources:
            await self._start(resources, settings, whole_gpu=whole_gpu, depth=depth)
            self._in_background(resources, self._hand_back_in_time(drain_s))
            self._resources = resources.pop_all()
        log.info("worker_ready", worker=self._id)

    async def _start(
        self, resources: AsyncExitStack, settings: Settings, *, whole_gpu: bool, depth: int
    ) -> None:
        """Start the engine and the pipeline, and register the worker. `resources` undoes it."""
        catalog = load_catalog(more=settings.workflows_dir)
        database = Database(settings.database_url.get_secret_value())
        resources.push_async_callback(database.aclose)
        blobs = open_blobs(settings, resources)
        jobs = PostgresJobStore(database, settings.queue_policy)
        self._engine = await resources.enter_async_context(
            engine_on_this_node(settings, catalog, ray.get_gpu_ids(), whole_gpu=whole_gpu)
        )
        loaded_models = LoadedModels(catalog, self._engine)
        if settings.warm_up_workflow:
            await loaded_models.warm_up(settings.warm_up_workflow)
        registration = WorkerRegistration(
            PostgresWorkerRegistry(database),
            self._id,
            self._report,
            self._engine.restart,
            settings.heartbeat_s,
        )
        execution = await self._open_execution(resources, settings, catalog, database, jobs, blobs)
        versions = [versioned(each.name, each.version) for each in catalog.versions()]
        self._pipeline = Pipeline(
            worker=self._id,
            workflows=[CUSTOM, *versions],
            jobs=jobs,
            blobs=blobs,
            engine=self._engine,
            loaded_models=loaded_models,
            run=execution.run,
            release=execution.release,
            lease_s=settings.lease_s,
            depth=depth,
            undrained=registration.undrained,
            is_stopping=is_draining,
        )
        await registration.report()  # fetches the orders before the first ticket arrives
        resources.push_async_callback(registration.leave)
        resources.push_async_callback(self._pipeline.hand_back)
        self._in_background(resources, registration.run())

    async def _open_execution(
        self,
        resources: AsyncExitStack,
        settings: Settings,
        catalog: Catalog,
        database: Database,
        jobs: WorkerQueue,
        blobs: BlobStore,
    ) -> Execution:
        """Open the image processes, and the recorders of progress, usage and metrics."""
        board = RedisStatusBoard(settings.redis_url.get_secret_value())
        resources.push_async_callback(board.aclose)
        progress = ProgressReporter(status_actor(), board)
        resources.push_async_callback(progress.aclose)
        self._in_background(resources, progress.run())
        usage = UsageRecorder(PostgresUsageLedger(database), settings.heartbeat_s)
        resources.push_async_callback(usage.write)
        self._in_background(resources, usage.run())
        meter = RayMeter()
        self._in_background(resources, EngineMetrics(self._engine, meter).run())
        images = await resources.enter_async_context(
            ImageProcessPool(
                settings.upload_limits,
                processes=1 + STORING,
                cpu_s=settings.image_cpu_s,
                niceness=IMAGE_NICENESS,
            )
        )
        return Execution(
            catalog,
            jobs,
            blobs,
            self._engine,
            images,
            progress,
            Lease(settings.heartbeat_s, settings.lease_s),
            observer=Observers(usage, MetricsObserver(meter), SpanObserver()),
        )

    def _in_background(self, resources: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the background until `resources` stops it."""
        task = asyncio.create_task(work)
        self._background.append(task)
        resources.push_async_callback(stop, task)

    async def process(self, hold_s: float) -> TicketOutcome:
        """Run the best waiting job, then others while some wait; see `Pipeline.process`."""
        return await self._pipeline.process(hold_s)

    def _report(self, restarts_done: int) -> WorkerReport:
        state = EngineState.READY if self._engine.alive else EngineState.DOWN
        if self._engine.broken is not None:
            state = EngineState.BROKEN
        return WorkerReport(
            id=self._id,
            node=socket.gethostname(),
            engine_url=self._engine.url,
            engine=state,
            engine_starts=self._engine.starts,
            in_hand=self._pipeline.in_hand,
            restarts_done=restarts_done,
            engine_version=self._engine.version,
        )

    async def _hand_back_in_time(self, drain_s: float) -> None:
        """Wait until Serve drains the replica, and release unfinished jobs before it kills it."""
        while not is_draining():  # noqa: ASYNC110 # Serve has a flag for it and no event
            await asyncio.sleep(DRAIN_POLL_S)
        log.info("worker_drains", worker=self._id, jobs_in_hand=len(self._pipeline.in_hand))
        until_hand_back_s = drain_s - min(HAND_BACK_S, drain_s / 2)
        await asyncio.sleep(until_hand_back_s)
        await self._pipeline.hand_back()

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
        """Release running jobs and stop the engine. Serve awaits it, after it has drained."""
        await self._resources.aclose()
