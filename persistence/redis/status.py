"""StatusBoard on Redis: best effort, with short timeouts.

The keys of a job expire a day after its last event. Their loss is harmless, because the job's row
is authoritative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from uuid import UUID

from persistence.redis.client import connect, translated_errors
from persistence.redis.followers import BLOCK_S, StreamReader
from persistence.redis.stream_codec import (
    entry_fields,
    latest_key,
    parse_event,
    row_fields,
    stream_key,
)
from restoration.events import JobEvent, StateChanged, to_json
from restoration.jobs import Job
from restoration.ports.progress import BOARD_EVENTS, StampedEvent

_TIMEOUT_S = 1.0
_KEPT_S = 24 * 3600


class RedisStatusBoard:
    """StatusBoard on Redis. Bound to the event loop in which it is created."""

    def __init__(self, redis_url: str) -> None:
        """Create the clients: commands share a pool, and all followers share one connection.

        They connect on first use.
        """
        self._commands = connect(redis_url, timeout_s=_TIMEOUT_S, retries=1)
        self._blocking = connect(redis_url, timeout_s=BLOCK_S + _TIMEOUT_S, retries=0)
        self._reader = StreamReader(self._commands, self._blocking)

    async def publish(self, events: Sequence[tuple[UUID, JobEvent]]) -> None:
        """Publish all events in one round trip.

        Raises DependencyUnavailable after about two seconds; some events may be written then.
        """
        await self._write([(job_id, event, entry_fields(event)) for job_id, event in events])

    async def conclude(self, job: Job) -> None:
        """See StatusBoard. One round trip; raises DependencyUnavailable as `publish` does."""
        end = StateChanged(job.status, job.attempt)
        await self._write([(job.id, end, entry_fields(end) | row_fields(job))])

    async def _write(self, entries: Sequence[tuple[UUID, JobEvent, dict[Any, Any]]]) -> None:
        newest: dict[UUID, dict[Any, str]] = defaultdict(dict)
        for job_id, event, _ in entries:
            newest[job_id][event.type] = to_json(event)
        with translated_errors():
            async with self._commands.pipeline(transaction=False) as pipeline:
                # The hash first, because readers of a preview's stream entry look it up there.
                for job_id, by_type in newest.items():
                    pipeline.hset(latest_key(job_id), mapping=by_type)
                for job_id, _, fields in entries:
                    pipeline.xadd(stream_key(job_id), fields, maxlen=BOARD_EVENTS)
                for job_id in newest:
                    pipeline.expire(latest_key(job_id), _KEPT_S)
                    pipeline.expire(stream_key(job_id), _KEPT_S)
                await pipeline.execute()

    async def latest(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[JobEvent]]:
        """See StatusBoard. One round trip; raises DependencyUnavailable."""
        with translated_errors():
            async with self._commands.pipeline(transaction=False) as pipeline:
                for job_id in job_ids:
                    pipeline.hgetall(latest_key(job_id))
                answers = await pipeline.execute()
        boards: dict[UUID, Sequence[JobEvent]] = {}
        for job_id, by_type in zip(job_ids, answers, strict=True):
            events = [event for text in by_type.values() if (event := parse_event(text))]
            if events:
                boards[job_id] = events
        return boards

    async def follow(self, job_id: UUID) -> AsyncGenerator[StampedEvent, None]:
        """See StatusBoard. Continues after a failure of Redis, and ends with `aclose`.

        A slow follower loses the oldest events.
        """
        async with self._reader.join(job_id) as follower:
            while (stamped := await follower.take()) is not None:
                yield stamped

    async def ping(self) -> None:
        with translated_errors():
            await self._commands.ping()

    async def aclose(self) -> None:
        """End every follower's iteration, and close the connections."""
        await self._reader.aclose()
        await self._blocking.aclose()
        await self._commands.aclose()
