"""The dispatcher: sends one ticket to the GPU workers for each waiting job.

A ticket represents demand, not a particular job: Serve queues and routes tickets, and the worker
that receives one claims the best waiting job at that moment. The leader also scales the pool with
the demand (`actors.leader.autoscaler`). One replica leads, by an advisory lock in Postgres; the
others wait until its connection ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import structlog
from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.cluster.handles import ServePool
from actors.execution.pipeline import TicketOutcome
from actors.leader.autoscaler import PoolScaler
from actors.leader.election import lead_whenever_possible
from actors.leader.queue_metrics import QueueMetrics
from actors.observability.logging import configure_logging
from actors.observability.metrics import RayMeter
from persistence.postgres.database import Database
from persistence.postgres.job_counts import Census
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.leadership import Leadership, attempt_of
from restoration.errors import DependencyUnavailable
from restoration.jobs import AttemptRef
from restoration.ports.jobs import LeaderQueue
from restoration.scaling import Scaler, ScalingPolicy
from restoration.settings import load_settings
from restoration.tasks import stop

log = structlog.get_logger(__name__)

# The queue is polled this often without a hint, for delayed retries and expired leases.
TICK_S = 1.0
# A ticket that a busy worker returned is sent again: soon at first, because another worker may be
# idle, then with longer holds, because all of them may be busy for long.
FIRST_HOLD_S = 0.25
LONGEST_HOLD_S = 5.0

# Sends a ticket, which the worker may hold for so many seconds before it claims a job. Raises
# RayError and RayServeException; the `actor_id` of an ActorDiedError names the dead worker.
Send = Callable[[AttemptRef, float], Awaitable[TicketOutcome]]


class TicketDispatcher:
    """Sends tickets and tracks the outstanding ones, keyed by (job, attempt).

    The attempt is part of the key so that a stuck ticket never blocks a job that was queued again.
    """

    def __init__(
        self,
        jobs: LeaderQueue,
        send: Send,
        window: int,
        on_done: Callable[[], None],
        pause_s: float,
    ) -> None:
        self._jobs = jobs
        self._send = send
        self._window = window
        self._on_done = on_done
        self._pause_s = pause_s
        self._outstanding: dict[AttemptRef, asyncio.Task[None]] = {}
        self._sent = 0  # outstanding tickets, without those that only pause before the next one
        self._hold_s: dict[AttemptRef, float] = {}  # for attempts whose last ticket came back BUSY

    async def issue(self) -> None:
        """Send a ticket for each waiting job that has none, up to the window."""
        waiting = await self._jobs.waiting(self._window)
        self._hold_s = {ref: self._hold_s[ref] for ref in waiting if ref in self._hold_s}
        for ref in waiting:
            if not self.offer(ref):
                return

    def offer(self, ref: AttemptRef) -> bool:
        """Send a ticket for this attempt unless it has one. Return False if the window is full."""
        if ref in self._outstanding:
            return True
        if self._sent >= self._window:
            return False
        self._sent += 1
        self._outstanding[ref] = asyncio.create_task(self._follow(ref))
        return True

    async def _follow(self, ref: AttemptRef) -> None:
        try:
            if not await self._process(ref):
                # Another ticket for this job would not help now; other jobs may use the window.
                await asyncio.sleep(self._pause_s)
        finally:
            del self._outstanding[ref]
            self._on_done()

    async def _process(self, ref: AttemptRef) -> bool:
        """Send the ticket. Return whether another may follow at once if its job still waits.

        False if the worker found nothing to claim, because the job may wait for a worker that has
        its workflow, and False if the deployment refused the ticket.
        """
        try:
            hold_s = self._hold_s.get(ref, FIRST_HOLD_S)
            match await self._send(ref, hold_s):
                case TicketOutcome.RAN:
                    return True
                case TicketOutcome.BUSY:
                    self._hold_s[ref] = min(2 * hold_s, LONGEST_HOLD_S)
                    return True
                case TicketOutcome.NOTHING_CLAIMED:
                    return False
        except (RayError, RayServeException) as error:
            if isinstance(error, ActorDiedError) and error.actor_id is not None:
                await self._reclaim(error.actor_id)
                return True
            log.warning("ticket_failed", job_id=str(ref.job_id), reason=str(error))
            return False
        finally:
            self._sent -= 1
            self._on_done()

    async def _reclaim(self, worker: str) -> None:
        """Queue the dead worker's jobs again without waiting for their leases to expire."""
        try:
            jobs = await self._jobs.reclaim(worker)
        except DependencyUnavailable as error:
            log.warning("reclaim_left_to_leases", reason=error.message)
            return
        log.warning("worker_died", worker=worker, jobs=[str(job.id) for job in jobs])

    async def aclose(self) -> None:
        """Cancel the outstanding tickets. A job that a worker has claimed on one still runs."""
        await stop(*self._outstanding.values())
        self._outstanding.clear()  # a task cancelled before its first step leaves its entry
        self._sent = 0


class Dispatch:
    """The leader's work. Plain async code, so that tests run it without Ray."""

    def __init__(
        self,
        jobs: LeaderQueue,
        signals: Leadership,
        send: Send,
        window: int,
        lease_s: float,
        tick_s: float = TICK_S,
    ) -> None:
        self._jobs = jobs
        self._signals = signals
        self._wake = asyncio.Event()
        self._tickets = TicketDispatcher(jobs, send, window, self._wake.set, tick_s)
        self._lease_s = lease_s
        self._tick_s = tick_s

    async def lead(self) -> None:
        """Work as the leader. Raises DependencyUnavailable when the lock is lost."""
        # During an outage of Postgres no worker could extend its lease, so each gets one lease's
        # time before the leader reclaims jobs.
        clock = asyncio.get_running_loop().time
        reclaim_from = clock() + self._lease_s
        tend_from = clock()
        hints = asyncio.create_task(self._listen())
        try:
            while not hints.done():
                self._wake.clear()
                await self._tickets.issue()  # before _tend: an idle worker may need only the ticket
                if (now := clock()) >= tend_from:
                    await self._tend(reclaims=now >= reclaim_from)
                    tend_from = now + self._tick_s
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._tick_s):
                        await self._wake.wait()
            hints.result()
        finally:
            await stop(hints)
            await self._tickets.aclose()

    async def _listen(self) -> None:
        """Send a ticket at once for each attempt that a hint names."""
        try:
            while True:
                for hint in await self._signals.wait(self._tick_s):
                    ref = attempt_of(hint)
                    if ref is None or not self._tickets.offer(ref):
                        self._wake.set()  # the table is to be polled
        finally:
            self._wake.set()

    async def _tend(self, *, reclaims: bool) -> None:
        """Reclaim expired leases, end overdue jobs, promote jobs that are old or start again."""
        if reclaims:
            for job in await self._jobs.reclaim():
                log.warning("lease_lapsed", job_id=str(job.id), attempt=job.attempt, now=job.status)
        for job in await self._jobs.expire():
            log.warning("queue_deadline_passed", job_id=str(job.id))
        await self._jobs.promote()


class Dispatcher:
    """The Serve deployment. Secrets come from the node's environment, never from arguments."""

    def __init__(self, workers: DeploymentHandle[Any], window: int, scaling: ScalingPolicy) -> None:
        settings = load_settings(os.environ)
        configure_logging(settings.log_format)
        self._workers = workers
        self._window = window
        self._scaling = scaling
        url = settings.database_url.get_secret_value()
        self._database = Database(url)
        self._jobs = PostgresJobStore(self._database, settings.queue_policy)
        self._queue_metrics = QueueMetrics(Census(self._database), RayMeter())
        self._lease_s = settings.lease_s
        self._task = asyncio.get_running_loop().create_task(
            lead_whenever_possible(self._lead, lambda: Leadership(url), "dispatcher")
        )

    async def _lead(self, signals: Leadership) -> None:
        dispatch = Dispatch(self._jobs, signals, self._send, self._window, self._lease_s)
        async with self._queue_metrics.leading(), AsyncExitStack() as resources:
            if self._scaling.min_workers < self._scaling.max_workers:
                scaler = PoolScaler(self._jobs, ServePool(), Scaler(self._scaling))
                resources.push_async_callback(stop, asyncio.create_task(scaler.run()))
            await dispatch.lead()

    async def _send(self, _: AttemptRef, hold_s: float) -> TicketOutcome:
        # A worker is not told the attempt: it claims the best job of the moment.
        outcome: TicketOutcome = await self._workers.process.remote(hold_s)
        return outcome

    def check_health(self) -> None:
        """Raise if the replica's task has ended; Serve then replaces the replica."""
        if self._task.done():
            self._task.result()

    async def __del__(self) -> None:
        await stop(self._task)
        await self._database.aclose()
