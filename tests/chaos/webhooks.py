"""Receive the webhooks of a chaos run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID

from anyio.from_thread import start_blocking_portal

from restoration.jobs import JobStatus
from tests.chaos.ledger import Ledger
from tests.fakes.receiver import Receiver, Seen, receiving, verify


@contextmanager
def listening() -> Iterator[Receiver]:
    """Run a receiver in a thread of its own."""
    with start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(receiving()) as receiver:
            yield receiver


def note_webhooks(seen: Iterable[Seen], secret: str, ledger: Ledger) -> None:
    """Record the ends that webhooks report; one not signed by the service counts as trouble."""
    for each in seen:
        if verify(secret, each.headers, each.body, tolerance_s=math.inf):
            told = json.loads(each.body)
            status = JobStatus(told["type"].removeprefix("restoration."))
            ledger.hears_end(UUID(told["data"]["id"]), status)
        else:
            ledger.has_trouble("webhook: not signed by the service")
