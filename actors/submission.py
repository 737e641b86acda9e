"""The one door for a job, over HTTP and from batch scripts alike.

Check everything, then S3, then the row, then the hint: whoever gets a job back may rely on it.
A failure on the way leaves at most an orphaned object, never a row without its input.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import structlog

from actors.pictures import examine
from persistence.blobs import input_key
from restoration.errors import (
    DependencyUnavailable,
    IdempotencyConflict,
    IllegalTransition,
    InvalidRequest,
    QueueFull,
    StorageFull,
)
from restoration.images import UploadLimits, check_result
from restoration.jobs import (
    Job,
    JobStatus,
    NewJob,
    OutputFormat,
    ParamValue,
    Priority,
)
from restoration.ports import BlobStore, JobStore
from restoration.quotas import Quotas
from restoration.webhook_urls import WebhookRules, check_url
from workflows.catalog import Catalog, Workflow

log = structlog.get_logger(__name__)

MAX_NAME_CHARS = 255


@dataclass(frozen=True, slots=True)
class SubmissionRequest:
    """What a caller asks for, as yet unchecked. `image` is the file's bytes as they came.

    No `output_format` means the workflow's own, as do limits that are not given; a request may
    ask for shorter ones, in seconds.
    """

    owner: str
    image: bytes
    workflow: str
    params: Mapping[str, object]
    output_format: OutputFormat | None = None
    priority: Priority = Priority.INTERACTIVE
    idempotency_key: str | None = None
    queue_limit_s: float | None = None
    run_limit_s: float | None = None
    webhook_url: str | None = None
    quotas: Quotas | None = None  # those of the settings if there are none


@dataclass(frozen=True, slots=True)
class Submitted:
    """`replayed`: the idempotency key had been used, and this is the job it made."""

    job: Job
    replayed: bool


@dataclass(frozen=True, slots=True)
class Order:
    """What a request asks for, checked and complete: everything but the picture."""

    workflow: Workflow
    params: Mapping[str, ParamValue]
    output_format: OutputFormat
    priority: Priority
    queue_limit_s: float | None = None
    run_limit_s: float | None = None
    webhook_url: str | None = None

    def digest(self, subject: bytes) -> str:
        """sha256, in hex, that two requests share only when they ask for the same.

        `subject` is the picture, or whatever stands for the pictures of a batch.
        """
        asked = [
            *(self.workflow.name, dict(self.params), self.output_format, self.priority),
            *(self.queue_limit_s, self.run_limit_s),
            self.webhook_url,
        ]
        text = json.dumps(asked, sort_keys=True)
        return hashlib.sha256(text.encode() + b"\0" + subject).hexdigest()


class Submission:
    """Checks and records jobs. Holds no state of its own."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: JobStore,
        blobs: BlobStore,
        limits: UploadLimits,
        webhooks: WebhookRules | None = None,
    ) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._blobs = blobs
        self._limits = limits
        self._webhooks = webhooks or WebhookRules()

    async def submit(self, request: SubmissionRequest) -> Submitted:
        """Record a job that will end, whatever is killed after this returns.

        Raises InvalidRequest and its kin, IdempotencyConflict, QueueFull, StorageFull,
        DependencyUnavailable.
        """
        order = self.check(request)
        digest = await asyncio.to_thread(order.digest, request.image)
        if earlier := await self._earlier(request, digest):
            return Submitted(earlier, replayed=True)
        await self.demand_room(request)
        new = replace(
            await self.prepare(request, order, uuid4()),
            idempotency_key=request.idempotency_key,
            request_digest=digest,
        )
        try:
            job, created = await self._jobs.insert(new, request.quotas)
        except (IdempotencyConflict, QueueFull, StorageFull):
            await self.discard(new)
            raise
        if not created:  # another request with the same key was quicker
            await self.discard(new)
        return Submitted(job, replayed=not created)

    async def retry(
        self, job_id: UUID, owner: str | None = None, quotas: Quotas | None = None
    ) -> Submitted:
        """Send a job that failed or was cancelled again, as a new job on the same input.

        The new job asks for the same of the workflow as it is now. A job is sent again once:
        after that `replayed` says that the job is an earlier one. Raises JobNotFound, QueueFull,
        StorageFull, InputExpired, IllegalTransition for a job in another state, UnknownWorkflow or
        InvalidParameters when the workflow has changed, DependencyUnavailable.
        """
        source = await self._jobs.get(job_id, owner)
        if source.status not in {JobStatus.FAILED, JobStatus.CANCELLED}:
            raise IllegalTransition(
                f"the job is {source.status}; only one that failed or was cancelled is sent again",
                status=source.status,
            )
        job, created = await self._jobs.insert(self._again(source), quotas)
        return Submitted(job, replayed=not created)

    def _again(self, source: Job) -> NewJob:
        workflow = self._catalog.find(source.workflow)
        waited_s = (source.queue_deadline_at - source.created_at).total_seconds()
        return NewJob(
            id=uuid4(),
            owner=source.owner,
            workflow=workflow.name,
            workflow_version=workflow.version,
            params=workflow.resolve(source.params),
            output_format=source.output_format,
            priority=source.priority,
            input=source.input,
            max_attempts=workflow.manifest.max_attempts,
            request_digest=source.request_digest,
            queue_limit_s=min(waited_s, workflow.manifest.queue_limit_s),
            run_limit_s=source.run_limit_s,
            retry_of=source.id,
            webhook_url=source.webhook_url,
        )

    def check(self, request: SubmissionRequest) -> Order:
        """All that can be said without the picture. Raises InvalidRequest and its kin."""
        _check_names(request)
        workflow = self._catalog.find(request.workflow)
        output = workflow.manifest.output
        output_format = request.output_format or output.default_format
        if output_format not in output.formats:
            raise InvalidRequest(
                f"{workflow.name} cannot write {output_format}; "
                f"choose from {', '.join(output.formats)}"
            )
        if request.webhook_url is not None:
            check_url(request.webhook_url, self._webhooks)
        return Order(
            workflow,
            workflow.resolve(request.params),
            output_format,
            request.priority,
            _shorter("queue_limit_s", request.queue_limit_s, workflow.manifest.queue_limit_s),
            _shorter("run_limit_s", request.run_limit_s, workflow.manifest.run_limit_s),
            request.webhook_url,
        )

    async def _earlier(self, request: SubmissionRequest, digest: str) -> Job | None:
        if request.idempotency_key is None:
            return None
        found = await self._jobs.find_by_key(request.owner, request.idempotency_key)
        if found is not None and found.request_digest != digest:
            raise IdempotencyConflict(
                "this Idempotency-Key was used for a different request; use a new key",
                job_id=str(found.id),
            )
        return found

    async def demand_room(self, request: SubmissionRequest) -> None:
        """Before any work, so that a full system says so at once. Raises QueueFull, StorageFull."""
        await self._jobs.check_room(request.owner, request.quotas, len(request.image))

    async def prepare(self, request: SubmissionRequest, order: Order, job_id: UUID) -> NewJob:
        """Examine the picture and store it; what comes back is ready to be recorded.

        Raises InvalidRequest and its kin for a picture that cannot be used.
        """
        picture = await asyncio.to_thread(examine, request.image, self._limits)
        scale = int(order.params.get("scale", 1))
        check_result(picture.width, picture.height, scale, order.output_format, self._limits)
        key = input_key(job_id, picture.type)
        return NewJob(
            id=job_id,
            owner=request.owner,
            workflow=order.workflow.name,
            workflow_version=order.workflow.version,
            params=order.params,
            output_format=order.output_format,
            priority=order.priority,
            input=await self._blobs.put(key, request.image, picture.type.value),
            max_attempts=order.workflow.manifest.max_attempts,
            queue_limit_s=order.queue_limit_s or order.workflow.manifest.queue_limit_s,
            run_limit_s=order.run_limit_s,
            webhook_url=order.webhook_url,
        )

    async def discard(self, prepared: NewJob) -> None:
        """Remove the input of a job that will not be recorded."""
        key = prepared.input.key
        try:
            await self._blobs.delete(key)
        except DependencyUnavailable as error:  # no reason to keep the answer from the caller
            log.warning("object_orphaned", key=key, reason=error.message)


def _shorter(name: str, asked_s: float | None, limit_s: float) -> float | None:
    if asked_s is not None and not 0 < asked_s <= limit_s:
        raise InvalidRequest(f"{name} must be above 0 and at most the workflow's {limit_s:g} s")
    return asked_s


def _check_names(request: SubmissionRequest) -> None:
    _check_name("the owner", request.owner)
    if request.idempotency_key is not None:
        _check_name("Idempotency-Key", request.idempotency_key)


def _check_name(what: str, text: str) -> None:
    if not (0 < len(text) <= MAX_NAME_CHARS and text.isprintable()):
        raise InvalidRequest(f"{what} must have 1 to {MAX_NAME_CHARS} printable characters")
