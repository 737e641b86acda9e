"""The API's JSON as pydantic models, written by the server and read by the Python client.

This module does not depend on FastAPI. Internal data (S3 keys, workers, leases) is never included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from actors.observability.tracing import trace_id_of
from restoration.events import JobEvent, Progressed
from restoration.jobs import AttemptOutcome, Job, JobStatus, OutputFormat, ParamValue, Priority
from restoration.webhooks.messages import Delivery, DeliveryStatus
from workflows.manifest import CUSTOM


class View(BaseModel):
    """Base class of the API's models: immutable, and made of objects with the same attributes."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, from_attributes=True)


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


def progress_view(job: Job, events: Iterable[JobEvent]) -> ProgressView | None:
    """Return the progress of the job's current attempt among `events`, if any."""
    for event in events:
        if isinstance(event, Progressed) and event.attempt == job.attempt:
            return ProgressView.model_validate(event)
    return None


def webhook_view(job: Job, delivery: Delivery | None) -> WebhookView | None:
    if job.options.webhook_url is None:
        return None
    return WebhookView(url=job.options.webhook_url, **asdict(delivery or Delivery()))


def restoration(
    job: Job, links: Links, progress: ProgressView | None, webhook: WebhookView | None
) -> Restoration:
    """Return the job's view, with those of its fields and options that the view declares."""
    return Restoration.model_validate(
        {
            **{field.name: getattr(job, field.name) for field in fields(job)},
            **asdict(job.options),
            "params": {} if job.workflow == CUSTOM else job.params,  # its graph has up to 64 KiB
            "trace_id": trace_id_of(job.traceparent),
            "progress": progress,
            "webhook": webhook,
            "links": links,
        }
    )
