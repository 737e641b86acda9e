"""The events of one job, shared by all of its watchers in this process.

One task follows the status board and appends to a log, in which each watcher has its own position.
An event costs a watcher a wake-up and the sending of shared bytes. The log keeps the newest events;
a watcher that falls behind it continues with the job's current state.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import cached_property

import structlog

from restoration.errors import DependencyUnavailable
from restoration.events import JobEvent, Previewed, StateChanged, is_last, to_json
from restoration.jobs import Job, JobStatus
from restoration.limits.fair_places import context_of
from restoration.ports.jobs import JobAccess
from restoration.ports.progress import BOARD_EVENTS, StatusBoard
from restoration.tasks import stop
from serve_app import sse
from serve_app.watch.shared import Shared

log = structlog.get_logger(__name__)

KEPT_EVENTS = 2 * BOARD_EVENTS

# the order of states within an attempt, by `restoration.jobs.TRANSITIONS`
_ORDER = {JobStatus.RUNNING: 0, JobStatus.CANCELLING: 1, JobStatus.QUEUED: 2}
_FINAL = 3


@dataclass(frozen=True)
class FeedEvent:
    """An event, with its id in the job's stream if it has one."""

    event: JobEvent
    id: str | None = None

    @cached_property
    def encoded(self) -> bytes:
        """The event as Server-Sent Event, encoded once for all watchers."""
        return sse.encode(sse.ServerEvent(self.event.type, to_json(self.event), self.id))


def state_of(job: Job) -> StateChanged:
    return StateChanged(job.status, job.attempt)


def is_later(state: StateChanged, than: StateChanged) -> bool:
    """Return whether a job enters `state` after `than`. Rows may be read in any order."""
    return _rank(state) > _rank(than)


def _rank(state: StateChanged) -> tuple[int, int]:
    return state.attempt, _ORDER.get(state.status, _FINAL)


class JobFeed(Shared):
    """The log of one job's events, which follows the status board until it is closed.

    It is created for the first watcher. The creator passes it rows of the job with `learn`.
    """

    def __init__(self, job: Job, jobs: JobAccess, board: StatusBoard) -> None:
        super().__init__()
        self.job = job
        # True once someone streams: a watcher that waits needs only the end.
        self.wants_states = False
        self._jobs = jobs
        self._log: deque[FeedEvent | None] = deque(maxlen=KEPT_EVENTS)
        self._end = 0  # the position after the newest event
        self._preview_at = -1
        self._task = asyncio.create_task(self._follow(board), context=context_of(job.owner))
        self._task.add_done_callback(self._ended)

    @property
    def start(self) -> int:
        """The position of the oldest event that is kept."""
        return self._end - len(self._log)

    def read_from(self, place: int) -> tuple[FeedEvent | None, int]:
        """Return the first event from position `place` on, or None, and the position to read next.

        If the log no longer goes back to `place`, the event is the job's current state.
        """
        while place < self._end:
            if place < self.start:
                return FeedEvent(state_of(self.job)), self.start
            event, place = self._log[place - self.start], place + 1
            if event is not None:
                return event, place
        return None, place

    def learn(self, job: Job, hint_id: str | None = None) -> None:
        """Append a row's state to the log, unless it is older than the known one."""
        if is_later(state_of(job), than=state_of(self.job)):
            self.job = job
            self._append(FeedEvent(state_of(job), hint_id))

    async def aclose(self) -> None:
        await stop(self._task)

    async def _follow(self, board: StatusBoard) -> None:
        async for stamped in board.follow(self.job.id):
            event = stamped.event
            if not isinstance(event, StateChanged):
                if event.attempt >= self.job.attempt:
                    self._append(FeedEvent(event, stamped.id))
            elif is_last(event) or (self.wants_states and is_later(event, state_of(self.job))):
                # Only a hint to read the row, unless the row came with it.
                try:
                    self.learn(stamped.row or await self._jobs.get(self.job.id), stamped.id)
                except DependencyUnavailable as error:
                    log.warning("job_not_reread", job_id=str(self.job.id), reason=error.message)

    def _append(self, event: FeedEvent) -> None:
        if isinstance(event.event, Previewed):
            if self._preview_at >= self.start:  # previews are large: only the newest is kept
                self._log[self._preview_at - self.start] = None
            self._preview_at = self._end
        self._log.append(event)
        self._end += 1
        self.wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
