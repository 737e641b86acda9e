"""Encoding of a job's events in Redis: keys, ids and stream entries.

`restore:{job}:latest` is a hash of the newest event of each type. `restore:{job}:events` is a
stream of all events. A preview's entry there is only a marker, and its picture is in the hash. The
entry of a job's end may also have the job's row.
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
_LARGEST_ROW_BYTES = 16 * 1024  # a larger row, with a user's own graph, is read from Postgres
PREVIEW = "preview"  # the type of Previewed, and the field that marks one in the stream


@dataclass(frozen=True, slots=True)
class Entry:
    """A stream entry. `event` is None for a preview, and for an event of an unknown type."""

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
    """Parse a stream id. Raises InvalidRequest if it is malformed."""
    milliseconds, dash, sequence = text.partition("-")
    if not (dash and _is_number(milliseconds) and _is_number(sequence)):
        raise InvalidRequest("the event id is invalid; send the id of an event of this stream")
    return int(milliseconds), int(sequence)


def _is_number(text: str) -> bool:
    # Unsigned 64-bit numbers have at most 20 digits; any 19 digits fit.
    return text.isascii() and text.isdecimal() and len(text) < 20


def entry_fields(event: JobEvent) -> dict[Any, Any]:
    return {PREVIEW: ""} if isinstance(event, Previewed) else {_EVENT_FIELD: to_json(event)}


def row_fields(job: Job) -> dict[Any, Any]:
    """Return the entry fields with a job's row, or none if it is too large."""
    row = _ROW.dump_json(job)
    return {_ROW_FIELD: row} if len(row) <= _LARGEST_ROW_BYTES else {}


def parse_event(text: str | None) -> JobEvent | None:
    """Parse an event. Return None if there is none, or if another version wrote it."""
    if text is None:
        return None
    try:
        return from_json(text)
    except ValueError:
        log.debug("unknown_event_passed_over")
        return None


def _parse_row(text: str | None) -> Job | None:
    """Parse a job's row. Return None if there is none, or if this version cannot read it."""
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
    """Return the entries after each position by key, waiting up to `block_s` for one (XREAD)."""
    streams: dict[Any, Any] = {key: format_id(position) for key, position in positions.items()}
    answer: Any = await client.xread(streams, count=count, block=round(block_s * 1000))
    return {
        key: [
            Entry(
                id=parse_id(id_text),
                event=parse_event(fields.get(_EVENT_FIELD)),
                is_preview=PREVIEW in fields,
                row=_parse_row(fields.get(_ROW_FIELD)),
            )
            for id_text, fields in found
        ]
        for key, found in answer or ()
    }
