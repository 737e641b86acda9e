"""Jobs, their states, and the allowed transitions between states.

Postgres holds the authoritative state of each job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from uuid import UUID

from restoration.errors import RestorationError, ResultExpired, ResultNotReady

ParamValue = bool | int | float | str

# An error message of a node can contain a whole tensor.
MAX_MESSAGE_CHARS = 2000


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return not TRANSITIONS[self]


# running → queued: the attempt was lost or handed back, and the job waits for another attempt.
# cancelling → succeeded / failed: the attempt ended before the cancel reached its engine.
TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = MappingProxyType(
    {
        JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.FAILED}),
        JobStatus.RUNNING: frozenset(
            {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLING, JobStatus.QUEUED}
        ),
        JobStatus.CANCELLING: frozenset(
            {JobStatus.CANCELLED, JobStatus.SUCCEEDED, JobStatus.FAILED}
        ),
        JobStatus.SUCCEEDED: frozenset(),
        JobStatus.FAILED: frozenset(),
        JobStatus.CANCELLED: frozenset(),
    }
)


def sources_of(target: JobStatus) -> frozenset[JobStatus]:
    """Return the states from which a job may move to `target`."""
    return frozenset(source for source, targets in TRANSITIONS.items() if target in targets)


class Priority(StrEnum):
    """Interactive jobs run before batch jobs."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class OutputFormat(StrEnum):
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def content_type(self) -> str:
        return f"image/{self.value}"

    @property
    def suffix(self) -> str:
        """File name suffix, with its dot."""
        return ".jpg" if self is OutputFormat.JPEG else f".{self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Options that travel unchanged from a submission to the job's row.

    A new one is declared here, in the form (`serve_app.forms.form`) and as a column of the same
    name; in the job's schema (`serve_app.schemas.restorations`) too if clients are to see it.
    CONTRIBUTING.md lists the steps.
    """

    priority: Priority = Priority.INTERACTIVE
    run_limit_s: float | None = None  # at most, and by default, the workflow's
    webhook_url: str | None = None
    keep_metadata: bool = False  # the result gets the photo's EXIF


@dataclass(frozen=True, slots=True)
class Artifact:
    """An object in S3, with the size and sha256 that are verified when it is read."""

    key: str
    sha256: str  # lower-case hex
    size_bytes: int
    content_type: str


@dataclass(frozen=True, slots=True)
class AttemptRef:
    """One attempt at a job. `attempt` is the fencing token: only the newest can finish the job."""

    job_id: UUID
    attempt: int


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason of a failed job: a stable error code, and a message for display."""

    code: str
    message: str

    @classmethod
    def of(cls, error: RestorationError) -> Failure:
        """Return the failure for `error`.

        A node's message can hold any text: lone surrogates and NULs are replaced, and it is cut
        to MAX_MESSAGE_CHARS.
        """
        unicode = error.message.encode(errors="replace").decode()  # replaces lone surrogates
        text = unicode.replace("\0", "\N{REPLACEMENT CHARACTER}")
        cut = text[: MAX_MESSAGE_CHARS - 1] + "…" if len(text) > MAX_MESSAGE_CHARS else text
        return cls(error.code, cut)


class AttemptOutcome(StrEnum):
    """The outcome of an attempt. FAILED counts towards `max_attempts`; HANDED_BACK does not."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    HANDED_BACK = "handed_back"


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One ended attempt. `code` and `message` are those of its error, if it had one."""

    attempt: int
    worker: str
    started_at: datetime
    ended_at: datetime
    outcome: AttemptOutcome
    code: str | None = None
    message: str | None = None


# A job can be handed back any number of times; its history keeps the newest attempts.
MAX_RECORDS = 50

DEFAULT_QUEUE_LIMIT_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Reused:
    """A copy of the result of the job `source`, stored for a new job."""

    source: UUID
    output: Artifact


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to record. The caller chooses `id`, because the input's S3 key contains it."""

    id: UUID
    owner: str
    workflow: str
    workflow_version: str
    params: Mapping[str, ParamValue]
    output_format: OutputFormat
    input: Artifact
    max_attempts: int
    options: JobOptions = field(default_factory=JobOptions)
    idempotency_key: str | None = None
    # sha256 over the whole request, to detect another request with the same idempotency key
    request_digest: str | None = None
    queue_limit_s: float = DEFAULT_QUEUE_LIMIT_S
    retry_of: UUID | None = None
    batch_id: UUID | None = None
    batch_index: int | None = None
    traceparent: str | None = None  # W3C Trace Context of the submission
    reused: Reused | None = None  # if set, the job is recorded as succeeded

    @property
    def object_keys(self) -> tuple[str, ...]:
        """S3 keys of the objects that were stored for the job before it was recorded."""
        return (self.input.key, *((self.reused.output.key,) if self.reused else ()))


@dataclass(frozen=True, slots=True)
class Job:
    """A recorded job. Times are aware datetimes in UTC.

    `attempt` counts claims and is the fencing token. `failed_attempts` counts the attempts that
    failed, up to `max_attempts`; a worker that shuts down hands its job back without adding to it.
    `attempts` are the ended attempts, oldest first, at most MAX_RECORDS. A job whose first attempt
    has not begun by `queue_deadline_at` fails. `retry_of` is the job that this one retries.
    `reused_from` is the job whose stored result was copied; this job then has no attempt.
    """

    id: UUID
    owner: str
    status: JobStatus
    workflow: str
    workflow_version: str
    params: Mapping[str, ParamValue]
    output_format: OutputFormat
    options: JobOptions
    input: Artifact
    created_at: datetime
    available_at: datetime
    queue_deadline_at: datetime
    attempt: int = 0
    failed_attempts: int = 0
    max_attempts: int = 3
    worker: str | None = None
    lease_until: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    output: Artifact | None = None
    failure: Failure | None = None
    idempotency_key: str | None = None
    request_digest: str | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)
    retry_of: UUID | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    # From these times on the objects may be deleted.
    input_expired_at: datetime | None = None
    output_expired_at: datetime | None = None
    batch_id: UUID | None = None
    batch_index: int | None = None
    traceparent: str | None = None  # W3C Trace Context of the submission
    reused_from: UUID | None = None

    @property
    def ref(self) -> AttemptRef:
        return AttemptRef(self.id, self.attempt)

    def result(self) -> Artifact:
        """Return the restored picture.

        Raises ResultNotReady, with the job's status, if there is none, and ResultExpired once it
        has been removed.
        """
        if self.output is None:
            reason = self.failure.message if self.failure else "it has no result yet"
            raise ResultNotReady(
                f"the job is {self.status}: {reason}", status=self.status, job_id=str(self.id)
            )
        if self.output_expired_at is not None:
            raise ResultExpired("the result has expired and was removed")
        return self.output


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of jobs, newest first. `next_cursor` is opaque, and None on the last page."""

    jobs: tuple[Job, ...]
    next_cursor: str | None
