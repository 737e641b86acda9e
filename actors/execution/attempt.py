"""Runs one attempt at a claimed job, from its input in S3 to its outcome in Postgres. No Ray.

A heartbeat runs concurrently: it extends the lease, and reports that the job was cancelled or that
another attempt owns it. Every attempt ends with exactly one fenced write to the job store, or with
none if its lease is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol
from uuid import UUID, uuid4

import structlog

from actors.execution.outcomes import Outcomes, RetryPolicy
from actors.images.encode import ENGINE_SUFFIX
from actors.images.process_pool import PreparedImage
from actors.observability.observers import NullObserver, Observer
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
    Pixels,
    Prompt,
)
from restoration.errors import (
    DependencyUnavailable,
    EngineInterrupted,
    EngineTimeout,
    LeaseLost,
    RestorationError,
)
from restoration.events import JobEvent, Previewed, Progressed, StateChanged
from restoration.jobs import Artifact, Job, JobStatus, OutputFormat
from restoration.ports import BlobStore, JobStore
from restoration.tasks import stop
from restoration.workers import Stage
from workflows.catalog import Catalog, Workflow
from workflows.custom import workflow_of
from workflows.graphs import moves_pixels
from workflows.render import render

log = structlog.get_logger(__name__)

Charge = Callable[[Job, float], None]  # `actors.execution.usage.UsageRecorder.charge`
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


class EngineOccupancy:
    """Receives a job's progress through the engine. This base class ignores it."""

    def staged(self, pixels: int) -> None:
        """The engine has the job's picture, of `pixels` pixels, in its queue."""

    def began(self) -> None:
        """The engine has begun to execute the job."""

    def left(self) -> None:
        """The engine has finished the job, and its result has been read."""

    @property
    def stage(self) -> Stage:
        return Stage.FETCHING  # no progress is recorded here


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


class RunLimit:
    """A time limit, in seconds, for the work on an attempt's picture.

    Decoding, executing the graph and encoding count; waiting for the engine does not.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = self._left_s = limit_s
        self._began_at: float | None = None
        self._timeout: asyncio.Timeout | None = None

    @asynccontextmanager
    async def bounding(self) -> AsyncIterator[None]:
        """Count the time from `begin` to the end of the block. Raises EngineTimeout if it is up."""
        try:
            async with asyncio.timeout(None) as self._timeout:
                yield
        except TimeoutError:
            message = f"the attempt took longer than the {self._limit_s:g} s allowed"
            raise EngineTimeout(message) from None
        finally:
            if self._began_at is not None:
                self._left_s -= asyncio.get_running_loop().time() - self._began_at
                self._began_at = None

    def begin(self) -> None:
        """Start to count. Call it within `bounding`; further calls have no effect."""
        if self._timeout is not None and self._began_at is None:
            self._began_at = asyncio.get_running_loop().time()
            self._timeout.reschedule(self._began_at + self._left_s)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt at `job`. `cancelled` is set when its cancellation was requested."""

    job: Job
    run_id: UUID
    visit: EngineOccupancy
    watch: Stopwatch
    cancelled: asyncio.Event


class Execution:
    """Runs claimed jobs on one engine. Any number of `run` calls may overlap."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: JobStore,
        blobs: BlobStore,
        engine: Engine,
        images: Images,
        publish: Publish,
        lease: Lease,
        retry: RetryPolicy | None = None,
        charge: Charge | None = None,
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
        self._charge = charge or (lambda *_: None)
        self._observer = observer or NullObserver()

    async def run(self, job: Job, visit: EngineOccupancy) -> Job | None:
        """Run the attempt at the claimed `job`, and return the job as its outcome left it.

        `visit` receives the job's progress through the engine, which is free for other jobs before
        the picture is encoded and stored. Return None if no outcome was recorded, because the
        lease was lost or Postgres stayed unavailable.
        """
        with structlog.contextvars.bound_contextvars(**_log_context(job)):
            self._publish(job.id, StateChanged(JobStatus.RUNNING, job.attempt))
            watch, ended = Stopwatch(), None
            try:
                ended = await self._attempt(job, visit, watch)
            except LeaseLost:
                log.warning("lease_lost")
            except DependencyUnavailable as error:
                log.error("outcome_not_recorded", reason=error.message)
            except asyncio.CancelledError:
                # LeaseLost: an outcome was recorded already, or another attempt owns the job
                with suppress(LeaseLost, DependencyUnavailable):
                    await self._outcomes.stopped(job)
                raise
            else:
                self._publish(job.id, StateChanged(ended.status, job.attempt), ended)
                log.info("attempt_ended", status=ended.status, timings_s=dict(ended.timings_s))
            finally:
                self._settle(job, watch, ended)
            return ended

    def _settle(self, job: Job, watch: Stopwatch, ended: Job | None) -> None:
        """Report the attempt's cost, stages and outcome to the ledger and the observer."""
        watch.stop()
        self._account(job, watch)
        self._observer.ended(job, watch, ended)

    def _account(self, job: Job, watch: Stopwatch) -> None:
        """Report the attempt's GPU time so far."""
        self._observer.executed(job, watch.take_gpu_s())
        if gpu_s := watch.gpu_s:
            self._charge(job, gpu_s)

    async def _attempt(self, job: Job, visit: EngineOccupancy, watch: Stopwatch) -> Job:
        run_id = uuid4()  # new for each attempt: ComfyUI accepts an id twice and mixes up the runs
        attempt = _Attempt(job, run_id, visit, watch, asyncio.Event())
        try:
            output = await self._under_lease(attempt)
        except LeaseLost:
            raise
        except EngineInterrupted:
            return await self._outcomes.stopped(job)
        except RestorationError as error:
            log.warning("attempt_failed", code=error.code, reason=error.message)
            return await self._outcomes.failed(job, error)
        except Exception:  # a bug ends this attempt, not the worker
            log.exception("attempt_broke")
            return await self._outcomes.broke(job)
        return await self._outcomes.succeeded(job, output, watch.laps_s)

    async def _restore(self, attempt: _Attempt) -> Artifact:
        job, watch = attempt.job, attempt.watch
        workflow = workflow_of(self._catalog, job)
        limit = RunLimit(job.options.run_limit_s or workflow.manifest.run_limit_s)
        self._progress(job, 0, "fetching")
        watch.enter("fetch")
        async with _interruptible(attempt.cancelled):
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
            async with _interruptible(attempt.cancelled), limit.bounding():
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
        job, watch, visit = attempt.job, attempt.watch, attempt.visit

        def render_for(image_name: str, output_prefix: str) -> Prompt:
            visit.staged(photo.pixels)
            return render(workflow, job.params, image_name, output_prefix)

        def on_event(event: EngineEvent) -> None:
            if isinstance(event, EngineBegan):
                limit.begin()  # not before: the time of jobs ahead in the engine does not count
                watch.enter(ENGINE)
                visit.began()
            elif isinstance(event, EngineNode):
                watch.enter_node(event.node_class)
            else:
                self._relay(job, event)

        run = EngineRun(
            attempt.run_id,
            photo.file,
            ENGINE_SUFFIX,
            render_for,
            workflow.manifest.output.node,
            _log_context(job),
        )
        async with limit.bounding():
            picture = await self._engine.run(run, on_event)
        visit.left()
        return picture

    def _relay(self, job: Job, event: EngineProgress | EnginePreview) -> None:
        match event:
            case EngineProgress(fraction, node_class):
                share = ENGINE_FROM + (ENGINE_TO - ENGINE_FROM) * fraction
                self._progress(job, share, node_class)
            case EnginePreview(data, content_type):
                self._publish(job.id, Previewed.from_bytes(data, content_type, job.attempt))

    def _progress(self, job: Job, fraction: float, stage: str) -> None:
        self._publish(job.id, Progressed(round(fraction, 4), stage, job.attempt))

    async def _under_lease(self, attempt: _Attempt) -> Artifact:
        """Return the stored result. Stops the work and raises LeaseLost if the lease is lost."""
        working = asyncio.create_task(self._restore(attempt))
        beating = asyncio.create_task(self._keep_lease(attempt))
        try:
            await asyncio.wait({working, beating}, return_when=asyncio.FIRST_COMPLETED)
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
            self._account(job, attempt.watch)


@asynccontextmanager
async def _interruptible(cancelled: asyncio.Event) -> AsyncIterator[None]:
    """Stop the block and raise EngineInterrupted when `cancelled` is set."""

    async def expire() -> None:
        await cancelled.wait()
        timeout.reschedule(asyncio.get_running_loop().time())

    expiring: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(None) as timeout:
            expiring = asyncio.create_task(expire())
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise EngineInterrupted("the job was cancelled") from None
    finally:
        if expiring is not None:
            await stop(expiring)


def _log_context(job: Job) -> dict[str, str | int]:
    """Return the fields of every log line about an attempt, including the engine's lines."""
    trace = {"trace_id": trace_id} if (trace_id := trace_id_of(job.traceparent)) else {}
    return {"job_id": str(job.id), "attempt": job.attempt, **trace}
