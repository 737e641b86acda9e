"""Events of a job, as a closed union, and their JSON.

Events are best effort and may skip progress; the job's row is authoritative. An event is encoded as
one flat JSON object whose `type` names its class.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Literal, assert_never

from pydantic import TypeAdapter

from restoration.jobs import JobStatus


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The job entered `status`. `attempt` is the current or last attempt."""

    status: JobStatus
    attempt: int
    type: Literal["state"] = "state"


@dataclass(frozen=True, slots=True)
class Progressed:
    """Progress of the attempt: `fraction` from 0 to 1 over the whole job, `stage` for display."""

    fraction: float
    stage: str
    attempt: int
    type: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class Previewed:
    """A small preview picture, base64-encoded."""

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
    """Parse an event. Raises pydantic.ValidationError, a ValueError, if `text` is not one."""
    return _ADAPTER.validate_json(text)


def is_last(event: JobEvent) -> bool:
    """Return whether `event` says that the job has ended."""
    match event:
        case StateChanged(status=status):
            return status.is_final
        case Progressed() | Previewed():
            return False
        case _:
            assert_never(event)
