"""How a batch script bears with a service that restarts or is full."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from restoration.errors import DependencyUnavailable, QueueFull
from restoration.queue_policy import RETRY_AFTER_S

# The service restarts, or Postgres does: calls are made again for as long, and this often.
PATIENCE_S = 60.0
RETRY_S = 1.0

T = TypeVar("T")


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns, which must be fit to be repeated: for PATIENCE_S after its first
    failure, however long that took to be one, and for as long as the queue is full."""
    deadline = math.inf
    while True:
        try:
            return call()
        except DependencyUnavailable:
            deadline = min(deadline, time.monotonic() + PATIENCE_S)
            if time.monotonic() + RETRY_S > deadline:
                raise
            time.sleep(RETRY_S)
        except QueueFull:  # there will be room: this is no outage
            time.sleep(RETRY_AFTER_S)
            deadline = math.inf
