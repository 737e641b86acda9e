"""The port to the live progress of jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from restoration.events import JobEvent
from restoration.jobs import Job

# A board keeps about this many of a job's newest events. Readers have room for twice as many, so
# that one that joins late loses nothing.
BOARD_EVENTS = 200


@dataclass(frozen=True, slots=True)
class StampedEvent:
    """An event with its id in the job's stream. Ids sort in the order of publication.

    `row` is the committed job, if the event is its end and was published by `conclude`.
    """

    id: str
    event: JobEvent
    row: Job | None = None


class StatusBoard(Protocol):
    """Live progress, best effort. Its loss affects progress bars but no job."""

    async def publish(self, events: Sequence[tuple[UUID, JobEvent]]) -> None: ...

    async def conclude(self, job: Job) -> None:
        """Publish the end of `job`, given as committed.

        Followers receive the row with the event, unless it is too large.
        """

    async def latest(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[JobEvent]]:
        """Return the newest event of each type, for each of the jobs that has any."""

    def follow(self, job_id: UUID) -> AsyncIterator[StampedEvent]:
        """Yield the stored events, then new ones without end. Outages are waited out."""

    async def ping(self) -> None: ...
