"""The pace of an engine's starts, and when to give up hope in them. Pure but for the clock."""

from __future__ import annotations

import time

from comfy_pool.limits import EngineLimits
from restoration.backoff import backoff_s
from restoration.errors import EngineUnavailable


class Starts:
    """Counts starts since a run last succeeded: the more there were, the further they are apart.

    So an engine that does not start, and one that dies under each run, both get the same pause.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._since_success = 0
        self._failed: list[EngineUnavailable] = []
        self._not_before = 0.0

    @property
    def broken(self) -> EngineUnavailable | None:
        """Why the last start failed, once as many in a row did as the limits allow."""
        hopeless = len(self._failed) >= self._limits.broken_after_starts
        return self._failed[-1] if hopeless else None

    def pause_s(self) -> float:
        """How long to wait before the next start."""
        return max(0.0, self._not_before - time.monotonic())

    def failed(self, error: EngineUnavailable) -> None:
        self._failed = [*self._failed, error][-self._limits.broken_after_starts :]
        self._count()

    def succeeded(self) -> None:
        self._failed = []
        self._count()

    def run_succeeded(self) -> None:
        self._since_success = 0
        self._not_before = 0.0

    def _count(self) -> None:
        limits = self._limits
        pause_s = backoff_s(limits.first_pause_s, limits.longest_pause_s, self._since_success)
        self._since_success += 1
        self._not_before = time.monotonic() + pause_s
