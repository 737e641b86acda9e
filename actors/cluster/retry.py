"""Retries for batch scripts while the service restarts or its queue is full."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from restoration.errors import DependencyUnavailable, QueueFull
from restoration.limits.quotas import RETRY_AFTER_S

# Covers a restart of the service or of Postgres.
PATIENCE_S = 60.0
RETRY_S = 1.0

T = TypeVar("T")


def patiently(call: Callable[[], T]) -> T:
    """Return the result of `call`, repeating it on DependencyUnavailable and QueueFull.

    `call` must be idempotent. DependencyUnavailable is raised PATIENCE_S after the first such
    failure, counted from when it was raised; a full queue is retried without limit and starts that
    time anew.
    """
    deadline = math.inf
    while True:
        try:
            return call()
        except DependencyUnavailable:
            deadline = min(deadline, time.monotonic() + PATIENCE_S)
            if time.monotonic() + RETRY_S > deadline:
                raise
            time.sleep(RETRY_S)
        except QueueFull:  # not an outage: there will be room
            time.sleep(RETRY_AFTER_S)
            deadline = math.inf
