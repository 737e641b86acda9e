"""A job, its states, and the only ways from one state to the next.

Postgres holds the truth about a job; this module says what that truth may look like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from uuid import UUID

from restoration.errors import IllegalTransition, RestorationError, ResultExpired, ResultNotReady

ParamValue = bool | int | float | str

# What a node says may have a tensor in it.
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


# running → queued: the attempt was lost or handed back, and the job waits for another.
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
    """The states from which a job may move to `target`."""
    return frozenset(source for source, targets in TRANSITIONS.items() if target in targets)


def check_transition(source: JobStatus, target: JobStatus) -> None:
    """Raise IllegalTransition unless the table allows `source` → `target`."""
    if target not in TRANSITIONS[source]:
        raise IllegalTransition(
            f"a job that is {source} cannot become {target}", source=source, target=target
        )


class Priority(StrEnum):
    """Class of service: every interactive job goes before every batch job."""

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
        """Of a file's name, with its dot."""
        return ".jpg" if self is OutputFormat.JPEG else f".{self.value}"


@dataclass(frozen=True, slots=True)
class Artifact:
    """Bytes in S3, and what they must turn out to be when they are read back."""

    key: str
    sha256: str  # lower-case hex
    size_bytes: int
    content_type: str


@dataclass(frozen=True, slots=True)
class AttemptRef:
    """One attempt at one job. `attempt` is the fencing token: only the newest may finish it."""

    job_id: UUID
    attempt: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed: `code` is an error's stable code, `message` is for a person."""

    code: str
    message: str

    @classmethod
    def of(cls, error: RestorationError) -> Failure:
        """With the error's message fit to be stored and shown, whatever a node put into it."""
        unicode = error.message.encode(errors="replace").decode()  # no half of a surrogate pair
        text = unicode.replace("\0", "\N{REPLACEMENT CHARACTER}")
        cut = text[: MAX_MESSAGE_CHARS - 1] + "…" if len(text) > MAX_MESSAGE_CHARS else text
        return cls(error.code, cut)


class AttemptOutcome(StrEnum):
    """How an attempt ended. FAILED is held against the job, HANDED_BACK is not."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    HANDED_BACK = "handed_back"


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt that is over; `code` and `message` say what went wrong, if anything did."""

    attempt: int
    worker: str
    started_at: datetime
    ended_at: datetime
    outcome: AttemptOutcome
    code: str | None = None
    message: str | None = None


# The history of a job that is handed back again and again keeps its newest attempts.
MAX_RECORDS = 50

DEFAULT_QUEUE_LIMIT_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Reused:
    """A copy, made for a new job, of the result that the job `source` was executed for."""

    source: UUID
    output: Artifact


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a submission writes. The id comes first, because the input's S3 key holds it."""

    id: UUID
    owner: str
    workflow: str
    workflow_version: str
    params: Mapping[str, ParamValue]
    output_format: OutputFormat
    priority: Priority
    input: Artifact
    max_attempts: int
    idempotency_key: str | None = None
    # sha256 over everything the request asked for: the same key must mean the same request
    request_digest: str | None = None
    queue_limit_s: float = DEFAULT_QUEUE_LIMIT_S
    run_limit_s: float | None = None  # None: the workflow's
    retry_of: UUID | None = None
    webhook_url: str | None = None
    keep_metadata: bool = False  # the result gets the photo's EXIF
    # the batch it came in, and its place there
    batch_id: UUID | None = None
    batch_index: int | None = None
    traceparent: str | None = None  # W3C Trace Context, of whatever submitted it
    reused: Reused | None = None  # then the job has succeeded as soon as it is recorded

    @property
    def object_keys(self) -> tuple[str, ...]:
        """Of what was stored for the job before it was recorded."""
        return (self.input.key, *((self.reused.output.key,) if self.reused else ()))


@dataclass(frozen=True, slots=True)
class Job:
    """A job as Postgres has it. Times are UTC and aware.

    `attempt` counts claims and is the fencing token; `failed_attempts` counts those that are
    held against the job, up to `max_attempts`. A worker that goes away in good order hands its
    job back without one. `attempts` are those that are over, oldest first, at most MAX_RECORDS.
    A job whose first attempt has not begun by `queue_deadline_at` fails; `retry_of` is the job
    that this one was sent again for. A job that was answered from a stored result has that of the
    job `reused_from`, and no attempt.
    """

    id: UUID
    owner: str
    status: JobStatus
    workflow: str
    workflow_version: str
    params: Mapping[str, ParamValue]
    output_format: OutputFormat
    priority: Priority
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
    run_limit_s: float | None = None
    retry_of: UUID | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    webhook_url: str | None = None
    keep_metadata: bool = False
    # from then on the bytes may be gone
    input_expired_at: datetime | None = None
    output_expired_at: datetime | None = None
    batch_id: UUID | None = None
    batch_index: int | None = None
    traceparent: str | None = None  # W3C Trace Context, of whatever submitted it
    reused_from: UUID | None = None

    @property
    def ref(self) -> AttemptRef:
        return AttemptRef(self.id, self.attempt)

    def result(self) -> Artifact:
        """The restored picture. Raises ResultNotReady, which says how the job stands, or
        ResultExpired."""
        if self.output is None:
            reason = self.failure.message if self.failure else "it has no result yet"
            raise ResultNotReady(
                f"the job is {self.status}: {reason}", status=self.status, job_id=str(self.id)
            )
        if self.output_expired_at is not None:
            raise ResultExpired("the result was kept for its time, and has been removed")
        return self.output


@dataclass(frozen=True, slots=True)
class JobPage:
    """Newest first. `next_cursor` is opaque, and None on the last page."""

    jobs: tuple[Job, ...]
    next_cursor: str | None
