"""One job's life, told once in this process to however many watch it.

One task follows the board. What happens goes into a log, in which each watcher has a place of its
own: an event costs a watcher no more than being woken and sending bytes that are shared. The log
keeps the latest events; whoever is behind it goes on with the state as it is.
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

KEPT_EVENTS = 400  # more than a board keeps of a job, so that whoever comes late loses nothing

# of one attempt, in the order in which `restoration.jobs.TRANSITIONS` lets them follow each other
_ORDER = {JobStatus.RUNNING: 0, JobStatus.CANCELLING: 1, JobStatus.QUEUED: 2}
_FINAL = 3


@dataclass(frozen=True)
class Seen:
    """An event, and its place in the job's stream if it has one."""

    event: JobEvent
    id: str | None = None

    @cached_property
    def encoded(self) -> bytes:
        """As it is sent; made once for all watchers."""
        return sse.encode(sse.ServerEvent(self.event.type, to_json(self.event), self.id))


def state_of(job: Job) -> StateChanged:
    return StateChanged(job.status, job.attempt)


def is_later(state: StateChanged, than: StateChanged) -> bool:
    """Whether a job is in `state` after it is in `than`: rows may be read in any order."""
    return _rank(state) > _rank(than)


def _rank(state: StateChanged) -> tuple[int, int]:
    return state.attempt, _ORDER.get(state.status, _FINAL)


class LiveJob:
    """Follows until it is closed; made for the first who watches.

    Whoever made it tells it now and then what the row says.
    """

    def __init__(self, job: Job, jobs: JobStore, board: StatusBoard) -> None:
        self.job = job
        self.users = 0
        self.shows_states = False  # else only the end matters, and rows are read for it alone
        self._jobs = jobs
        self._board = board
        self._after_id: str | None = None  # the last event that was taken from the board
        self._log: deque[Seen | None] = deque(maxlen=KEPT_EVENTS)
        self._end = self._ticked_at = 0  # the place after the newest event
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
        """The place of the oldest event that is kept."""
        return self._end - len(self._log)

    def next(self, place: int) -> tuple[Seen | None, int]:
        """The event at `place`, if it is there by now, and the place to look at after that."""
        while place < self._end:
            if place < self.start:
                return Seen(state_of(self.job)), self.start
            seen, place = self._log[place - self.start], place + 1
            if seen is not None:
                return seen, place
        return None, place

    async def wait(self) -> None:
        """Until something happened, or `wake`. Raises what it failed of."""
        if self._error is None:
            await self._woken.wait()
        if self._error is not None:
            raise self._error

    def learn(self, job: Job, hint_id: str | None = None) -> None:
        """Take note of a row that somebody has read, unless it is older than what is known."""
        if is_later(state_of(job), than=state_of(self.job)):
            self.job = job
            self._append(Seen(state_of(job), hint_id))

    def tick(self) -> None:
        """`wake`, if nothing has happened since the last tick: a thousand are not woken in vain."""
        if self._end == self._ticked_at:
            self.wake()
        self._ticked_at = self._end

    def wake(self) -> None:
        """Let everybody who waits look around, and the board be asked again if it was away."""
        # An event each time, so that nobody who was woken is kept from its next wait.
        self._woken.set()
        self._woken = asyncio.Event()

    def fail(self, error: BaseException) -> None:
        """End every watch: something is broken that no patience mends."""
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
                self._log[self._preview_at - self.start] = None  # pictures are large: one is kept
            self._preview_at = self._end
        self._log.append(seen)
        self._end += 1
        self.wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
