"""Who uses the system while it is being broken: several owners over HTTP.

Jobs come at a steady rate, as long as not too many are under way. Each submission has an
idempotency key, as those of any careful client, and asks for a webhook.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from restoration.jobs import Priority
from serve_app.client import ApiError, RestorationClient
from tests.chaos.ledger import Ledger, Sample
from tests.stack import Stack

OWNERS = ("alice", "bob", "carol")
WORKFLOW = "enlarge"
CANCELLED_SHARE = 0.08
LONGEST_THOUGHT_S = 1.5  # before a cancel: the job waits by then, or runs, or has ended
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Wish:
    """One job that somebody wants; `cancel_after_s` None: to its end."""

    owner: str
    sample: Sample
    priority: Priority
    cancel_after_s: float | None


class HttpUsers:
    """Submit, sometimes cancel, and watch to the end: one thread for each job under way."""

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
            owner: RestorationClient(stack.record.url, stack.token(owner), patience_s=PATIENCE_S)
            for owner in OWNERS
        }
        self._ledger = ledger
        self._samples = samples
        self._webhook_url = webhook_url
        self._rng = random.Random(seed)  # noqa: S311 - chance, not a secret

    def submit_steadily(self, period_s: float, at_most: int, stop: threading.Event) -> None:
        """A job every `period_s` until `stop`; returns when each has been seen through."""
        places = threading.Semaphore(at_most)

        def take_place(wish: Wish) -> None:
            try:
                self._see_through(wish)
            finally:
                places.release()

        with ThreadPoolExecutor(at_most) as pool:
            while not stop.wait(period_s):
                if places.acquire(blocking=False):
                    pool.submit(take_place, self._wish())
        for client in self._clients.values():
            client.close()

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
            ledger.sees_end(job.id, client.wait(job.id).status)
        except ApiError as error:
            ledger.has_trouble(f"watch over HTTP: {error.code}")
