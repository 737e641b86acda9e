"""How a job's events lie in Redis: the keys, the ids, the entries of a stream.

`restore:{job}:latest` is a hash of the newest event of each type; `restore:{job}:events` a stream
of all, in which a preview is only mentioned, for its picture lies in the hash. A job's end may have
its row beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from pydantic import TypeAdapter
from redis.asyncio import Redis

from restoration.errors import InvalidRequest
from restoration.events import JobEvent, Previewed, from_json, to_json
from restoration.jobs import Job

log = structlog.get_logger(__name__)

StreamId = tuple[int, int]  # milliseconds, sequence number
START: StreamId = (0, 0)

_EVENT_FIELD = "event"
_ROW_FIELD = "row"
_ROW = TypeAdapter(Job)
_LARGEST_ROW_BYTES = 16 * 1024  # one with a graph of the user's own may be read in Postgres
PREVIEW = "preview"  # the type of Previewed, and the field that mentions one in the stream


@dataclass(frozen=True, slots=True)
class Entry:
    """`event` is None for a preview, and for what this version does not know."""

    id: StreamId
    event: JobEvent | None
    is_preview: bool
    row: Job | None = None


def latest_key(job_id: UUID) -> str:
    return f"restore:{job_id}:latest"


def stream_key(job_id: UUID) -> str:
    return f"restore:{job_id}:events"


def format_id(position: StreamId) -> str:
    return f"{position[0]}-{position[1]}"


def parse_id(text: str) -> StreamId:
    """Raises InvalidRequest for what is no id of a stream."""
    milliseconds, dash, sequence = text.partition("-")
    if not (dash and _is_number(milliseconds) and _is_number(sequence)):
        raise InvalidRequest("the event id is not one that this service gave out")
    return int(milliseconds), int(sequence)


def _is_number(text: str) -> bool:
    # 64 bits unsigned have at most 20 digits, 19 of which always fit.
    return text.isascii() and text.isdecimal() and len(text) < 20


def entry_fields(event: JobEvent) -> dict[Any, Any]:
    return {PREVIEW: ""} if isinstance(event, Previewed) else {_EVENT_FIELD: to_json(event)}


def row_fields(job: Job) -> dict[Any, Any]:
    """What goes with the event of an end."""
    row = _ROW.dump_json(job)
    return {_ROW_FIELD: row} if len(row) <= _LARGEST_ROW_BYTES else {}


def parse_event(text: str | None) -> JobEvent | None:
    """None for nothing, and for an event of another version: one that is not ours to show."""
    if text is None:
        return None
    try:
        return from_json(text)
    except ValueError:
        log.debug("unknown_event_passed_over")
        return None


def _parse_row(text: str | None) -> Job | None:
    """None for nothing, and for a row that this version cannot read."""
    if text is None:
        return None
    try:
        return _ROW.validate_json(text)
    except ValueError:
        log.debug("unknown_row_passed_over")
        return None


async def read_entries(
    client: Redis, positions: Mapping[str, StreamId], count: int, block_s: float
) -> dict[str, Sequence[Entry]]:
    """XREAD: the entries after each position, by key; waits up to `block_s` for the first."""
    streams: dict[Any, Any] = {key: format_id(position) for key, position in positions.items()}
    answer: Any = await client.xread(streams, count=count, block=round(block_s * 1000))
    return {key: [_entry(*raw) for raw in found] for key, found in answer or ()}


def _entry(id_text: str, fields: Mapping[str, str]) -> Entry:
    return Entry(
        id=parse_id(id_text),
        event=parse_event(fields.get(_EVENT_FIELD)),
        is_preview=PREVIEW in fields,
        row=_parse_row(fields.get(_ROW_FIELD)),
    )
