"""The job-status actor: writes progress events to Redis and serves them to batch scripts.

There is one named, detached actor in a cluster. Its state is in Redis, so it survives a restart;
every method may be repeated. Events that cannot be written are dropped: progress is best effort,
and a job's row is authoritative for its end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn
from uuid import UUID

import ray
import structlog
from ray.actor import ActorHandle

from actors.observability.logging import configure_logging
from persistence.redis.status import RedisStatusBoard
from restoration.errors import DependencyUnavailable
from restoration.events import JobEvent, from_json, is_last, to_json
from restoration.jobs import Job
from restoration.ports.progress import StatusBoard
from restoration.settings import load_settings
from restoration.tasks import stop

log = structlog.get_logger(__name__)

NAME = "job-status"
NAMESPACE = "comfy-restore"
MAX_WATCHERS = 1_000

# (job id, event as JSON): plain text, so that scripts with another release of this package read it.
WireEvent = tuple[str, str]


class Watchers:
    """Callers that wait for jobs to end.

    Each concurrency group of an actor has its own event loop: publishers run on one, watchers on
    another, and calls between them go through `call_soon_threadsafe`.
    """

    def __init__(self) -> None:
        self._waiting: dict[UUID, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def wait(self, job_ids: Sequence[UUID], timeout_s: float) -> None:
        """Return when one of the jobs ended, or after `timeout_s`."""
        self._loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for job_id in job_ids:
            self._waiting.setdefault(job_id, set()).add(ended)
        try:
            await asyncio.wait_for(ended.wait(), timeout_s)
        except TimeoutError:
            return
        finally:
            for job_id in set(job_ids):
                waiting = self._waiting[job_id]
                waiting.discard(ended)
                if not waiting:
                    del self._waiting[job_id]

    def wake(self, job_ids: Sequence[UUID]) -> None:
        """Wake the callers that wait for any of these jobs. Safe to call from any event loop."""
        if self._loop is not None and job_ids:
            self._loop.call_soon_threadsafe(self._set, job_ids)

    def _set(self, job_ids: Sequence[UUID]) -> None:
        for job_id in job_ids:
            for ended in self._waiting.get(job_id, ()):
                ended.set()


class StatusActor:
    """The Ray actor. Job ids cross the handle as strings, and events as JSON."""

    def __init__(self) -> None:
        settings = load_settings(os.environ)
        configure_logging(settings.log_format)
        self._board = RedisStatusBoard(settings.redis_url.get_secret_value())
        self._watchers = Watchers()

    async def publish(self, events: Sequence[WireEvent]) -> None:
        """Write events to Redis, and wake the callers that wait for jobs that ended."""
        decoded = [(UUID(job_id), from_json(text)) for job_id, text in events]
        try:
            await self._board.publish(decoded)
        except DependencyUnavailable as error:
            log.warning("progress_dropped", events=len(events), reason=error.message)
        self._watchers.wake([job_id for job_id, event in decoded if is_last(event)])

    async def latest(self, job_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return each job's newest event of each type, as JSON, without jobs that have none."""
        found = await self._board.latest([UUID(job_id) for job_id in job_ids])
        return {str(job_id): [to_json(event) for event in found[job_id]] for job_id in found}

    @ray.method(concurrency_group="watch")
    async def wait(self, job_ids: Sequence[str], timeout_s: float) -> None:
        """Return when one of the jobs ended, or after `timeout_s`. Callers then read the rows."""
        await self._watchers.wait([UUID(job_id) for job_id in job_ids], timeout_s)


def status_actor() -> ActorHandle[StatusActor]:
    """Return a handle to the cluster's status actor, which the first call starts."""
    remote: Any = ray.remote  # its stubs lack some options
    actor_class = remote(
        num_cpus=0,
        # On the head node: Ray never scales down a node that has an actor, even an idle one.
        resources={"node:__internal_head__": 0.001},
        max_restarts=-1,
        max_task_retries=-1,
        concurrency_groups={"watch": MAX_WATCHERS},
    )(StatusActor)
    handle: ActorHandle[StatusActor] = actor_class.options(
        name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote()
    return handle


class ProgressReporter:
    """Sends a worker's events to the status actor: one call at a time, at most four a second.

    Between calls it keeps every state change, but only a job's newest progress and preview. A
    state change is sent after a short delay (LINGER_S) together with the events that follow,
    because a quick job has ended by then. A final state skips the delays. It is also written to
    the status board directly, with the job's row, because that reaches clients that wait over HTTP
    sooner than the actor does.
    """

    PERIOD_S = 0.25
    LINGER_S = 0.1

    def __init__(self, actor: ActorHandle[StatusActor], board: StatusBoard) -> None:
        self._actor = actor
        self._board = board
        self._concluding: set[asyncio.Task[None]] = set()
        self._pending: dict[tuple[UUID, object], JobEvent] = {}
        self._due = asyncio.Event()
        self._urgent = asyncio.Event()

    def __call__(self, job_id: UUID, event: JobEvent, row: Job | None = None, /) -> None:
        """Queue an event; `row` is the job as committed, if it ended. Never blocks or raises."""
        key = (job_id, event if event.type == "state" else event.type)
        self._pending.pop(key, None)  # reinserted below, so that the newest event is sent last
        self._pending[key] = event
        self._due.set()
        if is_last(event):
            self._urgent.set()
        if row is not None and row.status.is_final:
            self._concluding.add(task := asyncio.create_task(self._conclude(row)))
            task.add_done_callback(self._concluding.discard)

    async def _conclude(self, job: Job) -> None:
        with suppress(DependencyUnavailable):  # the actor writes it too, and logs a failure
            await self._board.conclude(job)

    async def run(self) -> NoReturn:
        """Send queued events until cancelled."""
        while True:
            await self._due.wait()
            if any(event.type == "state" for event in self._pending.values()):
                await self._urgent_within(self.LINGER_S)
            self._due.clear()
            self._urgent.clear()
            pending, self._pending = self._pending, {}
            batch = [(str(job_id), to_json(event)) for (job_id, _), event in pending.items()]
            try:
                await self._actor.publish.remote(batch)
            except ray.exceptions.RayError as error:
                log.warning("progress_dropped", events=len(batch), reason=str(error))
            await self._urgent_within(self.PERIOD_S)

    async def _urgent_within(self, seconds: float) -> None:
        """Return after `seconds`, or as soon as a job's final state is queued."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._urgent.wait()

    async def aclose(self) -> None:
        await stop(*self._concluding)
