"""Runs one attempt at a claimed job, from its input in S3 to its outcome in Postgres. No Ray.

A heartbeat runs concurrently: it extends the lease, and reports that the job was cancelled or that
another attempt owns it. Every attempt ends with exactly one fenced write to the job store, or with
none if its lease is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, Protocol
from uuid import UUID, uuid4

import structlog

from actors.execution.engine_schedule import EngineOccupancy
from actors.execution.outcomes import Outcomes, RetryPolicy
from actors.execution.run_limit import RunLimit, interruptible
from actors.images.encode import ENGINE_SUFFIX
from actors.images.process_pool import PreparedImage
from actors.observability.observers import Observer, Observers
from actors.observability.timings import ENGINE, Stopwatch
from actors.observability.tracing import trace_id_of
from persistence.objects.keys import output_key
from restoration.engine_port import (
    Engine,
    EngineBegan,
    EngineEvent,
    EngineNode,
    EnginePreview,
    EngineProgress,
    EngineResult,
    EngineRun,
    EngineStaged,
    Pixels,
)
from restoration.errors import DependencyUnavailable, LeaseLost
from restoration.events import JobEvent, Previewed, Progressed, StateChanged
from restoration.jobs import Artifact, AttemptRef, Job, JobStatus, OutputFormat
from restoration.ports.jobs import WorkerQueue
from restoration.ports.objects import BlobStore
from restoration.tasks import stop
from workflows.catalog import Catalog, Workflow
from workflows.custom import workflow_of
from workflows.graphs import moves_pixels
from workflows.render import render

log = structlog.get_logger(__name__)

# The engine's part of the progress bar, after fetching and before encoding and storing.
ENGINE_FROM, ENGINE_TO = 0.05, 0.9
DEFAULT_QUALITY = 90


class Publish(Protocol):
    def __call__(self, job_id: UUID, event: JobEvent, row: Job | None = None, /) -> None:
        """Publish a job's event, best effort. `row` is the job, if a write has returned it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A job is reclaimed `lease_s` seconds after its last heartbeat, sent every `heartbeat_s`."""

    heartbeat_s: float
    lease_s: float


class Images(Protocol):
    """See `actors.images.process_pool.ImageProcessPool`."""

    async def prepare(
        self, data: bytes, *, keep_metadata: bool, on_white: bool
    ) -> PreparedImage: ...

    async def encode(
        self,
        picture: EngineResult,
        output_format: OutputFormat,
        quality: int,
        photo: PreparedImage,
        *,
        grey: bool,
    ) -> bytes: ...


@dataclass(slots=True)
class _Attempt:
    """One attempt at `job`. `cancelled` is set when its cancellation was requested.

    `ended` is the job as the recorded outcome left it.
    """

    job: Job
    occupancy: EngineOccupancy
    # new for each attempt: ComfyUI accepts an id twice and mixes up the runs
    run_id: UUID = field(default_factory=uuid4)
    watch: Stopwatch = field(default_factory=Stopwatch)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    ended: Job | None = None


class Execution:
    """Runs claimed jobs on one engine. Any number of `run` calls may overlap."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: WorkerQueue,
        blobs: BlobStore,
        engine: Engine,
        images: Images,
        publish: Publish,
        lease: Lease,
        retry: RetryPolicy | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._blobs = blobs
        self._engine = engine
        self._images = images
        self._publish = publish
        self._lease = lease
        self._outcomes = Outcomes(jobs, retry or RetryPolicy())
        self._observer = observer or Observers()
        self._attempts: dict[AttemptRef, _Attempt] = {}

    async def run(self, job: Job, occupancy: EngineOccupancy) -> Job | None:
        """Run the attempt at the claimed `job`, and return the job as its outcome left it.

        `occupancy` receives the job's progress through the engine, which is free for other jobs
        before the picture is encoded and stored. Return None if no outcome was recorded, because
        the lease was lost or Postgres stayed unavailable.
        """
        attempt = self._attempts[job.ref] = _Attempt(job, occupancy)
        with structlog.contextvars.bound_contextvars(**_log_context(job)):
            self._publish(job.id, StateChanged(JobStatus.RUNNING, job.attempt))
            try:
                await self._restore_and_record(attempt)
            except LeaseLost:
                log.warning("lease_lost")
            except DependencyUnavailable as error:
                log.error("outcome_not_recorded", reason=error.message)
            except asyncio.CancelledError:
                if attempt.ended is None:
                    with suppress(LeaseLost, DependencyUnavailable):
                        await self._record(attempt, self._outcomes.stopped(job))
                raise
            finally:
                del self._attempts[job.ref]
                attempt.watch.stop()
                self._account(attempt)
                self._observer.ended(job, attempt.watch, attempt.ended)
            return attempt.ended

    async def release(self, job: Job) -> None:
        """Hand back a running job before its `run` is cancelled. No effect on an ended one.

        Raises LeaseLost and DependencyUnavailable.
        """
        if (attempt := self._attempts.get(job.ref)) is not None:
            self._end(attempt, await self._jobs.release(job.ref, None))

    async def _restore_and_record(self, attempt: _Attempt) -> None:
        """Restore the picture, and record the outcome."""
        job = attempt.job
        try:
            output = await self._under_lease(attempt)
        except LeaseLost:
            raise
        except Exception as error:  # noqa: BLE001 - a bug ends this attempt, not the worker
            await self._record(attempt, self._outcomes.failed(job, error))
        else:
            timings_s = attempt.watch.laps_s
            await self._record(attempt, self._outcomes.succeeded(job, output, timings_s))

    async def _record(self, attempt: _Attempt, outcome: Coroutine[Any, Any, Job]) -> None:
        """Record the outcome to the end; a cancellation meanwhile is raised after it."""

        async def write() -> None:
            self._end(attempt, await outcome)

        writing = asyncio.create_task(write())
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            raise

    def _end(self, attempt: _Attempt, ended: Job) -> None:
        attempt.ended = ended
        self._publish(ended.id, StateChanged(ended.status, attempt.job.attempt), ended)
        log.info("attempt_ended", status=ended.status, timings_s=dict(ended.timings_s))

    async def _under_lease(self, attempt: _Attempt) -> Artifact:
        """Return the stored result. Stops the work and raises LeaseLost if the lease is lost."""
        working = asyncio.create_task(self._restore(attempt))
        beating = asyncio.create_task(self._keep_lease(attempt))
        try:
            await asyncio.wait({working, beating}, return_when=asyncio.FIRST_COMPLETED)
            # The heartbeat only ends by an exception, which `result` raises.
            return working.result() if working.done() else beating.result()
        finally:
            try:
                # The heartbeat goes on meanwhile, because an engine may take long to stop.
                await stop(working)
            finally:
                await stop(beating)
                attempt.watch.enter("finish")

    async def _keep_lease(self, attempt: _Attempt) -> NoReturn:
        job = attempt.job
        while True:
            await asyncio.sleep(self._lease.heartbeat_s)
            try:
                status = await self._jobs.heartbeat(job.ref, self._lease.lease_s)
            except DependencyUnavailable as error:
                log.warning("heartbeat_missed", reason=error.message)
                continue
            if status is JobStatus.CANCELLING:
                self._publish(job.id, StateChanged(status, job.attempt))
                attempt.cancelled.set()
                await self._engine.interrupt(attempt.run_id)
            self._account(attempt)

    def _account(self, attempt: _Attempt) -> None:
        """Report the attempt's GPU time so far."""
        watch = attempt.watch
        self._observer.executed(attempt.job, watch.gpu_s, watch.take_gpu_s())

    async def _restore(self, attempt: _Attempt) -> Artifact:
        job, watch = attempt.job, attempt.watch
        workflow = workflow_of(self._catalog, job)
        limit = RunLimit(job.options.run_limit_s or workflow.manifest.run_limit_s)
        self._progress(job, 0, "fetching")
        watch.enter("fetch")
        async with interruptible(attempt.cancelled):
            upload = await self._blobs.get(job.input)
            async with limit.bounding():
                limit.begin()
                photo = await self._images.prepare(
                    upload,
                    keep_metadata=job.options.keep_metadata,
                    on_white=moves_pixels(workflow.graph),
                )
        watch.enter("staged")
        picture = await self._run_engine(attempt, workflow, photo, limit)
        try:
            self._progress(job, ENGINE_TO, "storing")
            watch.enter("encode")
            async with interruptible(attempt.cancelled), limit.bounding():
                limit.begin()
                data = await self._images.encode(
                    picture,
                    job.output_format,
                    int(job.params.get("quality", DEFAULT_QUALITY)),
                    photo,
                    grey=photo.grey and workflow.manifest.output.keeps_grey,
                )
        finally:
            if isinstance(picture, Pixels):
                await picture.discard()
        watch.enter("store")
        key = output_key(job.ref, job.output_format)
        output = await self._blobs.put(key, data, job.output_format.content_type)
        watch.stop()
        return output

    async def _run_engine(
        self, attempt: _Attempt, workflow: Workflow, photo: PreparedImage, limit: RunLimit
    ) -> EngineResult:
        job, watch, occupancy = attempt.job, attempt.watch, attempt.occupancy

        def on_event(event: EngineEvent) -> None:
            match event:
                case EngineStaged():
                    occupancy.staged(photo.pixels)
                case EngineBegan():
                    limit.begin()  # not before: the time of jobs ahead in the engine does not count
                    watch.enter(ENGINE)
                    occupancy.began()
                case EngineNode(node_class):
                    watch.enter_node(node_class)
                case EngineProgress(fraction, node_class):
                    share = ENGINE_FROM + (ENGINE_TO - ENGINE_FROM) * fraction
                    self._progress(job, share, node_class)
                case EnginePreview(data, content_type):
                    self._publish(job.id, Previewed.from_bytes(data, content_type, job.attempt))

        run = EngineRun(
            attempt.run_id,
            photo.file,
            ENGINE_SUFFIX,
            partial(render, workflow, job.params),
            workflow.manifest.output.node,
            _log_context(job),
        )
        async with limit.bounding():
            picture = await self._engine.run(run, on_event)
        occupancy.finished()
        return picture

    def _progress(self, job: Job, fraction: float, stage: str) -> None:
        self._publish(job.id, Progressed(round(fraction, 4), stage, job.attempt))


def _log_context(job: Job) -> dict[str, str | int]:
    """Return the fields of every log line about an attempt, including the engine's lines."""
    trace = {"trace_id": trace_id} if (trace_id := trace_id_of(job.traceparent)) else {}
    return {"job_id": str(job.id), "attempt": job.attempt, **trace}
