"""Closed-loop load: many clients that each send the next request after the last answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """The measured throughput and latencies. `latencies_s` is sorted."""

    per_s: float
    latencies_s: Sequence[float]

    def percentile_s(self, percent: float) -> float:
        return self.latencies_s[min(len(self.latencies_s) - 1, int(percent / 100 * self.count))]

    @property
    def count(self) -> int:
        return len(self.latencies_s)


async def apply_load(call: Callable[[], Awaitable[object]], clients: int, seconds: float) -> Load:
    """Repeat the call from `clients` concurrent clients for `seconds`."""
    latencies_s: list[float] = []
    began = time.perf_counter()

    async def client() -> None:
        while (at := time.perf_counter()) - began < seconds:
            await call()
            latencies_s.append(time.perf_counter() - at)

    await asyncio.gather(*(client() for _ in range(clients)))
    took_s = time.perf_counter() - began
    return Load(len(latencies_s) / took_s, sorted(latencies_s))
