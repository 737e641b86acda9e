"""The API's JSON as pydantic models, written by the server and read by the Python client.

This module does not depend on FastAPI. Internal data (S3 keys, workers, leases) is never included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from restoration.events import JobEvent, Progressed
from restoration.jobs import (
    Artifact,
    AttemptOutcome,
    AttemptRecord,
    Failure,
    Job,
    JobStatus,
    OutputFormat,
    ParamValue,
    Priority,
)
from restoration.observability.tracing import trace_id_of
from restoration.observability.usage import Usage
from restoration.webhooks.messages import Delivery, DeliveryStatus
from workflows.manifest import CUSTOM


class View(BaseModel):
    """Base class of the API's models; immutable."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)


class ArtifactView(View):
    """A stored object, with the hash and the size to verify a download."""

    sha256: str = Field(description="lower-case hex")
    size_bytes: int
    content_type: str


class FailureView(View):
    code: str = Field(description="stable, for programs")
    message: str = Field(description="for people")


class AttemptView(View):
    """An attempt that is over. Only `failed` ones count against the job, not `handed_back` ones."""

    attempt: int
    started_at: datetime
    ended_at: datetime
    outcome: AttemptOutcome
    code: str | None = Field(description="what went wrong, for programs")
    message: str | None = Field(description="and for people")


class ProgressView(View):
    """The newest known progress of the current attempt; best effort."""

    fraction: float = Field(ge=0, le=1, description="of the whole job")
    stage: str
    attempt: int


class WebhookView(View):
    """The webhook that reports the job's end, and the state of its delivery."""

    url: str
    status: DeliveryStatus = Field(description="`dead` after a day of trying, or when refused")
    tries: int
    last_error: str | None
    next_try_at: datetime | None = Field(description="null until the job has ended")


class Links(View):
    """Paths of related resources on this host."""

    self_: str = Field(alias="self")
    events: str
    cancel: str
    retry: str
    result: str


class Restoration(View):
    """A job that restores one photo."""

    id: UUID
    status: JobStatus
    workflow: str
    workflow_version: str
    params: Mapping[str, ParamValue] = Field(description="every parameter, defaults filled in")
    output_format: OutputFormat
    priority: Priority
    batch_id: UUID | None = Field(description="the batch that the photo came in")
    attempt: int = Field(description="how many times the job was started")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    input: ArtifactView
    output: ArtifactView | None = Field(description="set once the job has succeeded")
    failure: FailureView | None = Field(description="why the job failed")
    timings_s: Mapping[str, float] = Field(description="seconds spent, by stage")
    trace_id: str | None = Field(None, description="of the trace that it was submitted in")
    attempts: tuple[AttemptView, ...] = Field(
        (), description="those that are over, oldest first; of very many the newest"
    )
    queue_deadline_at: datetime | None = Field(
        None, description="a job whose first attempt has not begun by then fails"
    )
    retry_of: UUID | None = Field(None, description="the job that this one was sent again for")
    reused_from: UUID | None = Field(
        None, description="the job whose result this one was answered with, without an attempt"
    )
    progress: ProgressView | None
    webhook: WebhookView | None = None
    keep_metadata: bool = Field(False, description="the result has the photo's EXIF")
    output_expired_at: datetime | None = Field(
        None, description="set when the result has been removed"
    )
    links: Links


class UploadView(View):
    """A link to send a photo to: PUT its bytes there, with these headers and no token."""

    id: UUID = Field(description="`upload_id` of the one submission that uses it")
    method: Literal["PUT"] = "PUT"
    url: str
    headers: Mapping[str, str]
    expires_at: datetime = Field(description="the link's; an upload is removed unless it is used")


class RestorationPage(View):
    """A page of jobs, newest first."""

    restorations: tuple[Restoration, ...]
    next: str | None = Field(description="path of the next page; null on the last")


class WorkflowView(View):
    """A workflow, with a JSON Schema of its `params`."""

    name: str
    version: str
    title: str
    description: str
    parameters: Mapping[str, Any]


class WorkflowList(View):
    workflows: tuple[WorkflowView, ...]


class Health(View):
    status: Literal["ok"]


class Readiness(View):
    """The state of the service. `degraded` still serves: only best-effort dependencies are down."""

    status: Literal["ok", "degraded", "unavailable"]
    dependencies: Mapping[str, Literal["ok", "error"]]


class Problem(View):
    """RFC 9457 problem details. Programs should use `code`, which is stable."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    details: Mapping[str, Any] = Field(
        default_factory=dict,
        description="more about it, by code; `problems` maps each wrong input to what is wrong",
    )


class UsageView(View):
    """The usage of one owner's jobs of one workflow, with every attempt counted."""

    owner: str
    workflow: str
    jobs: int
    attempts: int
    gpu_s: float = Field(description="seconds for which an engine executed them")


class UsageReport(View):
    since: datetime
    usage: tuple[UsageView, ...] = Field(description="the largest first")


def artifact_view(artifact: Artifact) -> ArtifactView:
    return ArtifactView(
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        content_type=artifact.content_type,
    )


def attempt_view(record: AttemptRecord) -> AttemptView:
    return AttemptView(
        attempt=record.attempt,
        started_at=record.started_at,
        ended_at=record.ended_at,
        outcome=record.outcome,
        code=record.code,
        message=record.message,
    )


def failure_view(failure: Failure | None) -> FailureView | None:
    return FailureView(code=failure.code, message=failure.message) if failure else None


def progress_view(job: Job, events: Iterable[JobEvent]) -> ProgressView | None:
    """Return the progress of the job's current attempt among `events`, if any."""
    for event in events:
        if isinstance(event, Progressed) and event.attempt == job.attempt:
            return ProgressView(fraction=event.fraction, stage=event.stage, attempt=event.attempt)
    return None


def webhook_view(job: Job, delivery: Delivery | None) -> WebhookView | None:
    if job.options.webhook_url is None:
        return None
    known = delivery or Delivery()
    return WebhookView(
        url=job.options.webhook_url,
        status=known.status,
        tries=known.tries,
        last_error=known.last_error,
        next_try_at=known.next_try_at,
    )


def restoration(
    job: Job, links: Links, progress: ProgressView | None, webhook: WebhookView | None
) -> Restoration:
    return Restoration(
        id=job.id,
        status=job.status,
        workflow=job.workflow,
        workflow_version=job.workflow_version,
        params={} if job.workflow == CUSTOM else job.params,  # the caller's graph, up to 64 KiB
        output_format=job.output_format,
        priority=job.options.priority,
        batch_id=job.batch_id,
        attempt=job.attempt,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        input=artifact_view(job.input),
        output=artifact_view(job.output) if job.output else None,
        failure=failure_view(job.failure),
        timings_s=job.timings_s,
        trace_id=trace_id_of(job.traceparent),
        attempts=tuple(map(attempt_view, job.attempts)),
        queue_deadline_at=job.queue_deadline_at,
        retry_of=job.retry_of,
        reused_from=job.reused_from,
        progress=progress,
        webhook=webhook,
        keep_metadata=job.options.keep_metadata,
        output_expired_at=job.output_expired_at,
        links=links,
    )


def usage_view(usage: Usage) -> UsageView:
    return UsageView(**asdict(usage))
