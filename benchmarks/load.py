"""Many clients at once, each sending its next request when it has the answer to the last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """What a service bore. `latencies_s` are sorted."""

    per_s: float
    latencies_s: Sequence[float]

    def percentile_s(self, percent: float) -> float:
        return self.latencies_s[min(len(self.latencies_s) - 1, int(percent / 100 * self.count))]

    @property
    def count(self) -> int:
        return len(self.latencies_s)


async def apply_load(call: Callable[[], Awaitable[object]], clients: int, seconds: float) -> Load:
    """Call again and again, from so many clients for so long."""
    latencies_s: list[float] = []
    began = time.perf_counter()

    async def client() -> None:
        while (at := time.perf_counter()) - began < seconds:
            await call()
            latencies_s.append(time.perf_counter() - at)

    await asyncio.gather(*(client() for _ in range(clients)))
    took_s = time.perf_counter() - began
    return Load(len(latencies_s) / took_s, sorted(latencies_s))
