"""Back off between an engine's starts, and detect one that keeps failing to start."""

from __future__ import annotations

import time

from comfy_pool.limits import EngineLimits
from restoration.backoff import backoff_s
from restoration.errors import EngineUnavailable


class RestartBackoff:
    """Exponential backoff by the number of starts since the last successful run.

    An engine that fails to start and one that dies in every run get the same pauses.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._since_success = 0
        self._failed: list[EngineUnavailable] = []
        self._not_before = 0.0

    @property
    def broken(self) -> EngineUnavailable | None:
        """The last start's error after `broken_after_starts` failures in a row, otherwise None."""
        hopeless = len(self._failed) >= self._limits.broken_after_starts
        return self._failed[-1] if hopeless else None

    def pause_s(self) -> float:
        """Return the seconds to wait before the next start."""
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
