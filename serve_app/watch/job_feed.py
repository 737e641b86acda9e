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
from restoration.ports import JobStore, StampedEvent, StatusBoard
from restoration.tasks import stop
from serve_app import sse

log = structlog.get_logger(__name__)

KEPT_EVENTS = 400  # more than a board keeps of a job, so that a late watcher loses nothing

# the order of states within an attempt, by `restoration.jobs.TRANSITIONS`
_ORDER = {JobStatus.RUNNING: 0, JobStatus.CANCELLING: 1, JobStatus.QUEUED: 2}
_FINAL = 3


@dataclass(frozen=True)
class Seen:
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


class LiveJob:
    """The log of one job's events, which follows the status board until it is closed.

    It is created for the first watcher. The creator passes it rows of the job with `learn`.
    """

    def __init__(self, job: Job, jobs: JobStore, board: StatusBoard) -> None:
        self.job = job
        self.users = 0
        self.shows_states = False  # otherwise rows are read only for the end
        self._jobs = jobs
        self._board = board
        self._after_id: str | None = None  # the last event taken from the board
        self._log: deque[Seen | None] = deque(maxlen=KEPT_EVENTS)
        self._end = self._ticked_at = 0  # the position after the newest event
        self._preview_at = -1
        self._woken = asyncio.Event()
        self._error: BaseException | None = None
        self._task = asyncio.create_task(self._run(), context=context_of(job.owner))
        self._task.add_done_callback(self._ended)

    @property
    def is_over(self) -> bool:
        return self._task.done() or self.job.status.is_final

    @property
    def start(self) -> int:
        """The position of the oldest event that is kept."""
        return self._end - len(self._log)

    def next(self, place: int) -> tuple[Seen | None, int]:
        """Return the first event from position `place` on, or None, and the position to read next.

        If the log no longer goes back to `place`, the event is the job's current state.
        """
        while place < self._end:
            if place < self.start:
                return Seen(state_of(self.job)), self.start
            seen, place = self._log[place - self.start], place + 1
            if seen is not None:
                return seen, place
        return None, place

    async def wait(self) -> None:
        """Wait for the next event, or for `wake`. Raises the error that ended the feed."""
        if self._error is None:
            await self._woken.wait()
        if self._error is not None:
            raise self._error

    def learn(self, job: Job, hint_id: str | None = None) -> None:
        """Append a row's state to the log, unless it is older than the known one."""
        if is_later(state_of(job), than=state_of(self.job)):
            self.job = job
            self._append(Seen(state_of(job), hint_id))

    def tick(self) -> None:
        """Wake the watchers, unless an event has woken them since the last tick."""
        if self._end == self._ticked_at:
            self.wake()
        self._ticked_at = self._end

    def wake(self) -> None:
        """Wake all watchers, and follow the board again after an outage."""
        # A new event each time, so that a watcher that was woken waits for the next one.
        self._woken.set()
        self._woken = asyncio.Event()

    def fail(self, error: BaseException) -> None:
        """End every watch by raising `error` in it. For errors that waiting cannot resolve."""
        self._error = error
        self.wake()

    async def aclose(self) -> None:
        await stop(self._task)

    async def _run(self) -> None:
        while True:
            try:
                async for stamped in self._board.follow(self.job.id, self._after_id):
                    await self._take(stamped)
                    self._after_id = stamped.id
            except DependencyUnavailable as error:
                log.warning("progress_unavailable", job_id=str(self.job.id), reason=error.message)
            await self._woken.wait()

    async def _take(self, stamped: StampedEvent) -> None:
        if isinstance(stamped.event, StateChanged):
            if not self._is_news(stamped.event):
                return
            if stamped.row is None:
                await self._reread(stamped.id)
            else:
                self.learn(stamped.row, stamped.id)
        elif stamped.event.attempt >= self.job.attempt:
            self._append(Seen(stamped.event, stamped.id))

    def _is_news(self, hint: StateChanged) -> bool:
        return is_last(hint) or (self.shows_states and is_later(hint, than=state_of(self.job)))

    async def _reread(self, hint_id: str | None = None) -> None:
        try:
            self.learn(await self._jobs.get(self.job.id), hint_id)
        except DependencyUnavailable as error:
            log.warning("job_not_reread", job_id=str(self.job.id), reason=error.message)

    def _append(self, seen: Seen) -> None:
        if isinstance(seen.event, Previewed):
            if self._preview_at >= self.start:
                self._log[self._preview_at - self.start] = (
                    None  # previews are large: only the newest is kept
                )
            self._preview_at = self._end
        self._log.append(seen)
        self._end += 1
        self.wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
