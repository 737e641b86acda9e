"""Several owners who submit over HTTP while the system is being broken.

Jobs are submitted at a steady rate, up to a limit of unfinished ones. Each submission has an
idempotency key, like that of any careful client, and asks for a webhook.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import UUID

from restoration.events import StateChanged
from restoration.jobs import Priority
from serve_app.client import ApiError, RestorationClient
from tests.chaos.ledger import Ledger, Sample
from tests.support.stack import Stack

OWNERS = ("alice", "bob", "carol")
WORKFLOW = "enlarge"
CANCELLED_SHARE = 0.08
LONGEST_THOUGHT_S = 1.5  # before a cancel: by then the job is waiting, running or done
PATIENCE_S = 600.0  # On a slow machine a killed part takes minutes to come back.


@dataclass(frozen=True, slots=True)
class Wish:
    """A job to submit; `cancel_after_s` is None for a job that is not cancelled."""

    owner: str
    sample: Sample
    priority: Priority
    cancel_after_s: float | None


class HttpUsers:
    """Submits jobs, cancels some, and watches each to its end in a thread of its own."""

    def __init__(
        self,
        stack: Stack,
        ledger: Ledger,
        samples: Sequence[Sample],
        webhook_url: str,
        *,
        seed: int,
    ) -> None:
        self._clients = {
            owner: RestorationClient(stack.record.url, stack.token(owner), retry_for_s=PATIENCE_S)
            for owner in OWNERS
        }
        self._ledger = ledger
        self._samples = samples
        self._webhook_url = webhook_url
        self._rng = random.Random(seed)  # noqa: S311 - chance, not a secret
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._load: Future[None]

    def start(self, period_s: float, at_most: int) -> None:
        """Submit a job every `period_s` seconds while fewer than `at_most` are unfinished."""
        self._load = self._thread.submit(self._submit_steadily, period_s, at_most)

    def submit_no_more(self) -> None:
        self._stop.set()

    def finish(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds until each job has been watched to its end. Raises what
        the watching raised. Threads that still watch a job give up once the stack has gone."""
        if wait([self._load], timeout_s).not_done:
            self._ledger.has_trouble("users over HTTP: did not end in time")
        else:
            self._load.result()

    def _submit_steadily(self, period_s: float, at_most: int) -> None:
        places = threading.Semaphore(at_most)

        def take_place(wish: Wish) -> None:
            try:
                self._see_through(wish)
            finally:
                places.release()

        with ExitStack() as ended, ThreadPoolExecutor(at_most) as pool:
            for client in self._clients.values():
                ended.callback(client.close)
            under_way = []
            while not self._stop.wait(period_s):
                if places.acquire(blocking=False):
                    under_way.append(pool.submit(take_place, self._wish()))
            for future in under_way:
                future.result()

    def _wish(self) -> Wish:
        rng = self._rng
        cancels = rng.random() < CANCELLED_SHARE
        return Wish(
            rng.choice(OWNERS),
            rng.choice(self._samples),
            rng.choice(list(Priority)),
            rng.uniform(0, LONGEST_THOUGHT_S) if cancels else None,
        )

    def _see_through(self, wish: Wish) -> None:
        client, ledger = self._clients[wish.owner], self._ledger
        ledger.submits()
        try:
            job = client.submit(
                wish.sample.photo,
                workflow=WORKFLOW,
                priority=wish.priority,
                webhook_url=self._webhook_url,
            )
        except ApiError as error:
            ledger.has_trouble(f"submit over HTTP: {error.code}")
            return
        ledger.accepts(job.id, wish.owner, wish.sample.name)
        try:
            if wish.cancel_after_s is not None:
                threading.Event().wait(wish.cancel_after_s)
                client.cancel(job.id)
            watch_to_end(client, job.id, ledger)
        except ApiError as error:
            ledger.has_trouble(f"watch over HTTP: {error.code}")


def watch_to_end(client: RestorationClient, job_id: UUID, ledger: Ledger) -> None:
    """Record the last state in the job's events, and then the state of the job itself."""
    states = [each.status for each in client.events(job_id) if isinstance(each, StateChanged)]
    ledger.sees_end(job_id, states[-1])
    ledger.sees_end(job_id, client.get(job_id).status)
