"""An in-memory RateLimiter with an evenly filling bucket for each owner."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from restoration.errors import DependencyUnavailable
from restoration.limits.rates import WINDOW_S, Rate


@dataclass
class MemoryRateLimiter:
    """`spent` holds for each owner the used seconds of the window, and the time of that value."""

    clock: Callable[[], float] = time.monotonic
    down: bool = False
    asked: int = 0
    spent: dict[str, tuple[float, float]] = field(default_factory=dict)

    async def take(self, owner: str, per_minute: int) -> Rate:
        self.asked += 1
        if self.down:
            raise DependencyUnavailable("Redis: refused at redis.internal")
        now = self.clock()
        spent_s, at = self.spent.get(owner, (0.0, now))
        spent_s = max(0.0, spent_s - (now - at)) + WINDOW_S / per_minute
        if spent_s > WINDOW_S + 1e-6:
            return Rate(per_minute, 0, spent_s - WINDOW_S, allowed=False)
        self.spent[owner] = (spent_s, now)
        left = math.floor((WINDOW_S - spent_s) * per_minute / WINDOW_S + 1e-3)
        return Rate(per_minute, left, spent_s)
