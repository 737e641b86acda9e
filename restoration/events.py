"""What a watcher of a job sees: a closed union of small events, and their JSON.

Events are best effort and may skip progress; the job's row is authoritative. Each event travels
as one flat JSON object whose `type` names its class.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Literal, assert_never

from pydantic import TypeAdapter

from restoration.jobs import JobStatus


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The job entered `status`; `attempt` is the one that runs, or ran last."""

    status: JobStatus
    attempt: int
    type: Literal["state"] = "state"


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far the attempt is: `fraction` from 0 to 1 over the whole job, `stage` for a person."""

    fraction: float
    stage: str
    attempt: int
    type: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class Previewed:
    """A small picture of the work so far, base64 in JSON."""

    content_type: str
    data_base64: str
    attempt: int
    type: Literal["preview"] = "preview"

    @classmethod
    def from_bytes(cls, data: bytes, content_type: str, attempt: int) -> Previewed:
        return cls(content_type, base64.b64encode(data).decode("ascii"), attempt)


JobEvent = StateChanged | Progressed | Previewed
_ADAPTER: TypeAdapter[JobEvent] = TypeAdapter(JobEvent)


def to_json(event: JobEvent) -> str:
    return _ADAPTER.dump_json(event).decode()


def from_json(text: str | bytes) -> JobEvent:
    """Raises pydantic.ValidationError (a ValueError) when `text` is no event."""
    return _ADAPTER.validate_json(text)


def is_last(event: JobEvent) -> bool:
    """True for the one event after which nothing more happens to the job."""
    match event:
        case StateChanged(status=status):
            return status.is_final
        case Progressed() | Previewed():
            return False
        case _:
            assert_never(event)
