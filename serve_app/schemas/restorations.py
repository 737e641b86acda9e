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

    sha256: str = Field(description="SHA-256 in lower-case hexadecimal.")
    size_bytes: int
    content_type: str


class FailureView(View):
    code: str = Field(description="Stable code, for programs.")
    message: str = Field(description="Message for people.")


class AttemptView(View):
    """An ended attempt. A `failed` one counts towards the maximum, a `handed_back` one does not."""

    attempt: int
    started_at: datetime
    ended_at: datetime
    outcome: AttemptOutcome
    code: str | None = Field(description="Stable code of the error, for programs.")
    message: str | None = Field(description="Message of the error, for people.")


class ProgressView(View):
    """The newest known progress of the current attempt. It may lag behind."""

    fraction: float = Field(ge=0, le=1, description="Fraction of the whole job that is done.")
    stage: str
    attempt: int


class WebhookView(View):
    """The webhook that reports the job's end, and the state of its delivery."""

    url: str
    status: DeliveryStatus = Field(
        description="`dead` means that delivery was given up, after 24 hours or a response with "
        "status 410."
    )
    tries: int
    last_error: str | None
    next_try_at: datetime | None = Field(
        description="Time of the next try, or null if none is planned."
    )


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
    params: Mapping[str, ParamValue] = Field(description="All parameters, including defaults.")
    output_format: OutputFormat
    priority: Priority
    batch_id: UUID | None = Field(description="Id of the batch that the photo belongs to.")
    attempt: int = Field(description="Number of times that the job was started.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    input: ArtifactView
    output: ArtifactView | None = Field(
        description="The result, or null unless the job has succeeded."
    )
    failure: FailureView | None = Field(description="Reason why the job failed.")
    timings_s: Mapping[str, float] = Field(description="Seconds spent in each stage.")
    trace_id: str | None = Field(
        None, description="Id of the trace in which the job was submitted."
    )
    attempts: tuple[AttemptView, ...] = Field(
        (), description="Ended attempts, oldest first. If there are very many, only the newest."
    )
    queue_deadline_at: datetime | None = Field(
        None, description="The job fails if its first attempt has not started by this time."
    )
    retry_of: UUID | None = Field(None, description="Id of the job that this job retries.")
    reused_from: UUID | None = Field(
        None, description="Id of the job whose stored result was copied, without an attempt."
    )
    progress: ProgressView | None
    webhook: WebhookView | None = None
    keep_metadata: bool = Field(False, description="The result has the photo's EXIF.")
    output_expired_at: datetime | None = Field(
        None, description="Time when the result was removed."
    )
    links: Links


class UploadView(View):
    """A signed URL for one photo. Send the bytes with PUT, these headers and no token."""

    id: UUID = Field(
        description="Value of `upload_id` in the submission that uses the upload. It can be used "
        "once."
    )
    method: Literal["PUT"] = "PUT"
    url: str
    headers: Mapping[str, str]
    expires_at: datetime = Field(
        description="Time when the link expires. An upload that is not used is removed later."
    )


class RestorationPage(View):
    """A page of jobs, newest first."""

    restorations: tuple[Restoration, ...]
    next: str | None = Field(description="Path of the next page, or null on the last page.")


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
        description="More about the error, by `code`. `problems` maps each invalid input to its "
        "problem.",
    )


class UsageView(View):
    """The usage of one owner's jobs of one workflow, with every attempt counted."""

    owner: str
    workflow: str
    jobs: int
    attempts: int
    gpu_s: float = Field(description="Seconds during which an engine executed the jobs.")


class UsageReport(View):
    since: datetime
    usage: tuple[UsageView, ...] = Field(description="Sorted by seconds, the largest first.")


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
