"""Watch jobs: live events from the status board, and states from the jobs' rows.

States come from the rows alone. A state on the board is a hint to read the row, unless the process
that committed the job's end put the row beside it. In addition, one statement reads the rows of all
watched jobs every `poll_s`. So no watcher misses the end while the board is down, or trusts an
attempt that has lost its lease. All watchers of a job share its feed (`serve_app.watch.job_feed`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import structlog

from persistence.redis.stream_codec import StreamId, parse_id
from restoration.errors import DependencyUnavailable
from restoration.events import StateChanged
from restoration.jobs import Job
from restoration.limits.fair_places import context_of
from restoration.ports.jobs import JobAccess
from restoration.ports.progress import StatusBoard
from serve_app.watch.job_feed import FeedEvent, JobFeed, is_later, state_of

log = structlog.get_logger(__name__)

POLL_S = 2.0


class JobWatcher:
    """Follows the watched jobs for all watchers of a replica."""

    def __init__(self, jobs: JobAccess, board: StatusBoard, poll_s: float = POLL_S) -> None:
        self._jobs = jobs
        self._board = board
        self._poll_s = poll_s
        self._feeds: dict[UUID, JobFeed] = {}
        self._polling: asyncio.Task[None] | None = None

    async def watch(
        self, job: Job, after: StreamId | None = None
    ) -> AsyncGenerator[FeedEvent | None, None]:
        """Yield the state of `job`, then its events until its end, and None now and then.

        The last event is the final state. With `after`, progress up to that id is left out. A None
        comes after at most `poll_s` without events, so that the caller can do something else. A
        slow caller loses progress events.
        """
        state = state_of(job)
        yield FeedEvent(state)
        if state.status.is_final:
            return
        async with self._joined(job) as feed:
            feed.wants_states = True
            place = feed.start
            while not state.status.is_final:
                event, place = feed.read_from(place)
                if event is None:
                    await feed.wait()
                    if feed.read_from(place)[0] is None:
                        yield None
                elif isinstance(event.event, StateChanged):
                    if is_later(event.event, than=state):
                        state = event.event
                        yield event
                elif event.event.attempt >= state.attempt and (
                    after is None or event.id is None or parse_id(event.id) > after
                ):
                    after = None
                    yield event

    async def wait(self, job: Job, timeout_s: float) -> Job:
        """Return the job at its end, or as it is after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._joined(job) as feed:
                while not feed.job.status.is_final:
                    await feed.wait()
                return feed.job
        except TimeoutError:
            log.debug("job_not_finished_in_time", job_id=str(job.id), timeout_s=timeout_s)
        try:
            return await self._jobs.get(job.id)
        except DependencyUnavailable as error:
            log.warning("job_not_reread", job_id=str(job.id), reason=error.message)
            return job

    @asynccontextmanager
    async def _joined(self, job: Job) -> AsyncIterator[JobFeed]:
        feed = self._feeds.get(job.id)
        if feed is None:
            feed = self._feeds[job.id] = JobFeed(job, self._jobs, self._board)
        if self._polling is None or self._polling.done():
            # works for all watchers, so not in the first one's name
            self._polling = asyncio.create_task(self._poll(), context=context_of(None))
            self._polling.add_done_callback(self._ended)
        feed.learn(job)
        feed.users += 1
        try:
            yield feed
        finally:
            feed.users -= 1
            if not feed.users:
                del self._feeds[job.id]
                if not self._feeds and self._polling is not None:
                    self._polling.cancel()
                    self._polling = None
                await feed.aclose()

    async def _poll(self) -> None:
        while True:
            # The board may lose a state, so the rows have to be read as well.
            await asyncio.sleep(self._poll_s)
            rows: Sequence[Job] = ()
            try:
                rows = await self._jobs.find(list(self._feeds))
            except DependencyUnavailable as error:
                log.warning("jobs_not_reread", jobs=len(self._feeds), reason=error.message)
            for row in rows:
                if row.id in self._feeds:
                    self._feeds[row.id].learn(row)
            for feed in self._feeds.values():
                feed.wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Only a bug ends the task early. It must reach the watchers, and not look like an outage.
        if not task.cancelled() and (error := task.exception()) is not None:
            for feed in self._feeds.values():
                feed.fail(error)
