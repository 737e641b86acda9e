"""Retries through outages, and while the service's queue is full."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_fixed

from restoration.errors import DependencyUnavailable, QueueFull
from restoration.limits.quotas import RETRY_AFTER_S

# Covers a restart of the service or of Postgres.
PATIENCE_S = 60.0
RETRY_S = 1.0

T = TypeVar("T")


class GiveUpAfter:
    """Stop a retry whose next call would begin more than `seconds` after the first failure.

    tenacity's own limits count from the first call, which may have taken minutes before it failed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = math.inf

    def __call__(self, state: RetryCallState) -> bool:
        now = time.monotonic()
        self._deadline = min(self._deadline, now + self._seconds)
        return now + state.upcoming_sleep > self._deadline


def patiently(call: Callable[[], T]) -> T:
    """Return the result of `call`, repeating it on DependencyUnavailable and QueueFull.

    `call` must be idempotent. DependencyUnavailable is raised PATIENCE_S after the first such
    failure, counted from when it was raised; a full queue is retried without limit and starts that
    time anew.
    """
    while True:
        through_outage = Retrying(
            retry=retry_if_exception_type(DependencyUnavailable),
            wait=wait_fixed(RETRY_S),
            stop=GiveUpAfter(PATIENCE_S),
            reraise=True,
        )
        try:
            return through_outage(call)
        except QueueFull:  # not an outage: there will be room
            time.sleep(RETRY_AFTER_S)
