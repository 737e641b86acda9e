"""One claimed job, from its input in S3 to its end in Postgres. Plain async code, no Ray.

A heartbeat runs beside the work: it keeps the lease, and brings the news that the job is to be
cancelled or that another attempt owns it now. Whatever happens, the attempt ends in exactly one
fenced call on the job store, or in silence when the lease is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol
from uuid import UUID, uuid4

import numpy as np
import structlog
from numpy.typing import NDArray

from actors.images.encode import ENGINE_SUFFIX, engine_input
from actors.images.reader import read
from actors.observation import NobodyWatches, Observer
from actors.outcomes import Outcomes, RetryPolicy
from actors.stopwatch import ENGINE, Stopwatch
from persistence.keys import output_key
from restoration.engine import (
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
from restoration.images import UploadLimits
from restoration.jobs import Artifact, Job, JobStatus, OutputFormat
from restoration.ports import BlobStore, JobStore
from restoration.tasks import stop
from restoration.tracing import trace_id_of
from restoration.workers import Stage
from workflows.catalog import Catalog, Workflow
from workflows.custom import workflow_of
from workflows.graphs import moves_pixels
from workflows.render import render

log = structlog.get_logger(__name__)

Charge = Callable[[Job, float], None]  # `actors.costs.CostBook.charge`
# `actors.images.encode.encode`, elsewhere
Encode = Callable[
    [EngineResult, OutputFormat, int, NDArray[np.uint8] | None, bytes | None, bool],
    Awaitable[bytes],
]

# The engine's share of the progress bar; fetching comes before it, encoding and storing after.
ENGINE_FROM, ENGINE_TO = 0.05, 0.9
DEFAULT_QUALITY = 90


class Publish(Protocol):
    def __call__(self, job_id: UUID, event: JobEvent, row: Job | None = None, /) -> None:
        """Tell watchers of a job's `event`, best effort; `row`: the job, if a write returned it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """`lease_s` after its last heartbeat a worker is taken for dead. Seconds."""

    heartbeat_s: float
    lease_s: float


class Visit:
    """A job's way through the engine, told to whoever lets jobs in; this one tells nobody."""

    def staged(self, pixels: int) -> None:
        """The engine has a picture of so many pixels; it executes it now, or after others."""

    def began(self) -> None:
        """It executes from now on."""

    def left(self) -> None:
        """It was executed to its end, and its result is out of the engine."""

    @property
    def stage(self) -> Stage:
        return Stage.FETCHING  # as far as this one knows


@dataclass(frozen=True, slots=True, eq=False)
class _Photo:
    """A picture for the engine, and what its result needs to know of the upload."""

    data: bytes
    pixels: int
    alpha: NDArray[np.uint8] | None
    exif: bytes | None
    grey: bool


def _prepare(data: bytes, limits: UploadLimits, *, keep_metadata: bool, on_white: bool) -> _Photo:
    image = read(data, limits, keep_metadata=keep_metadata)
    height, width, _ = image.pixels.shape
    file, alpha = engine_input(image, on_white=on_white)
    return _Photo(file, width * height, alpha, image.exif, image.is_grey)


class Execution:
    """Runs claimed jobs on one engine. Any number of `run` calls may overlap."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: JobStore,
        blobs: BlobStore,
        engine: Engine,
        encode: Encode,
        publish: Publish,
        lease: Lease,
        retry: RetryPolicy | None = None,
        charge: Charge | None = None,
        observer: Observer | None = None,
        limits: UploadLimits | None = None,
    ) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._blobs = blobs
        self._engine = engine
        self._encode = encode
        self._publish = publish
        self._lease = lease
        self._outcomes = Outcomes(jobs, retry or RetryPolicy())
        self._charge = charge or (lambda *_: None)
        self._observer = observer or NobodyWatches()
        self._limits = limits or UploadLimits()

    async def run(self, job: Job, visit: Visit) -> Job | None:
        """Take the claimed `job` to the end of this attempt.

        `visit` is told of its way through the engine, which is free for others before the
        picture is encoded and stored. None when the attempt could not be ended by us: its lease
        is lost, or Postgres stayed away.
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
                # LeaseLost: the outcome was being recorded, or the job is another's
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
        """Account for the attempt, whatever became of it; nothing else depends on that."""
        watch.stop()
        self._account(job, watch)
        self._observer.ended(job, watch, ended)

    def _account(self, job: Job, watch: Stopwatch) -> None:
        """Tell what the attempt has cost so far."""
        self._observer.executed(job, watch.take_gpu_s())
        if gpu_s := watch.gpu_s:
            self._charge(job, gpu_s)

    async def _attempt(self, job: Job, visit: Visit, watch: Stopwatch) -> Job:
        run_id = uuid4()  # never used before: ComfyUI takes an id twice and mixes the two up
        try:
            output = await self._under_lease(
                job, run_id, watch, self._restore(job, run_id, watch, visit)
            )
        except LeaseLost:
            raise
        except EngineInterrupted:
            return await self._outcomes.stopped(job)
        except RestorationError as error:
            log.warning("attempt_failed", code=error.code, reason=error.message)
            return await self._outcomes.failed(job, error)
        except Exception:  # the attempt's supervisor: a defect of ours ends it, not the worker
            log.exception("attempt_broke")
            return await self._outcomes.broke(job)
        return await self._outcomes.succeeded(job, output, watch.laps_s)

    async def _restore(self, job: Job, run_id: UUID, watch: Stopwatch, visit: Visit) -> Artifact:
        workflow = workflow_of(self._catalog, job)
        self._progress(job, 0, "fetching")
        watch.enter("fetch")
        photo = await asyncio.to_thread(
            _prepare,
            await self._blobs.get(job.input),
            self._limits,
            keep_metadata=job.keep_metadata,
            on_white=moves_pixels(workflow.graph),
        )
        watch.enter("staged")
        picture = await self._run_engine(job, workflow, run_id, photo, watch, visit)
        try:
            self._progress(job, ENGINE_TO, "storing")
            watch.enter("encode")
            quality = int(job.params.get("quality", DEFAULT_QUALITY))
            data = await self._encode(
                picture, job.output_format, quality, photo.alpha, photo.exif, photo.grey
            )
        finally:
            if isinstance(picture, Pixels):
                picture.discard()
        watch.enter("store")
        key = output_key(job.ref, job.output_format)
        output = await self._blobs.put(key, data, job.output_format.content_type)
        watch.stop()
        return output

    async def _run_engine(
        self,
        job: Job,
        workflow: Workflow,
        run_id: UUID,
        photo: _Photo,
        watch: Stopwatch,
        visit: Visit,
    ) -> EngineResult:
        limit_s = job.run_limit_s or workflow.manifest.run_limit_s

        def render_for(image_name: str, output_prefix: str) -> Prompt:
            visit.staged(photo.pixels)
            return render(workflow, job.params, image_name, output_prefix)

        def on_event(event: EngineEvent) -> None:
            if isinstance(event, EngineBegan):
                # What others took before is not held against this one.
                limit.reschedule(asyncio.get_running_loop().time() + limit_s)
                watch.enter(ENGINE)
                visit.began()
            elif isinstance(event, EngineNode):
                watch.enter_node(event.node_class)
            else:
                self._relay(job, event)

        output_node = workflow.manifest.output.node
        run = EngineRun(
            run_id, photo.data, ENGINE_SUFFIX, render_for, output_node, _log_context(job)
        )
        try:
            async with asyncio.timeout(None) as limit:
                picture = await self._engine.run(run, on_event)
        except TimeoutError:
            raise EngineTimeout(f"the attempt took longer than the {limit_s:g} s allowed") from None
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

    async def _under_lease(
        self, job: Job, run_id: UUID, watch: Stopwatch, work: Coroutine[None, None, Artifact]
    ) -> Artifact:
        """The result of `work`, which is cancelled as soon as the lease is known to be lost."""
        working = asyncio.create_task(work)
        beating = asyncio.create_task(self._keep_lease(job, run_id, watch))
        try:
            await asyncio.wait({working, beating}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else beating.result()
        finally:
            try:
                # The heart beats on meanwhile: an engine may take long to stop.
                await stop(working)
            finally:
                await stop(beating)
                watch.enter("finish")

    async def _keep_lease(self, job: Job, run_id: UUID, watch: Stopwatch) -> NoReturn:
        while True:
            await asyncio.sleep(self._lease.heartbeat_s)
            try:
                status = await self._jobs.heartbeat(job.ref, self._lease.lease_s)
            except DependencyUnavailable as error:
                log.warning("heartbeat_missed", reason=error.message)
                continue
            if status is JobStatus.CANCELLING:
                self._publish(job.id, StateChanged(status, job.attempt))
                await self._engine.interrupt(run_id)
            self._account(job, watch)


def _log_context(job: Job) -> dict[str, str | int]:
    """What is on each line about an attempt, the engine's own too."""
    trace = {"trace_id": trace_id} if (trace_id := trace_id_of(job.traceparent)) else {}
    return {"job_id": str(job.id), "attempt": job.attempt, **trace}
