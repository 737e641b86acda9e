"""Asks a worker's engine every few seconds how it is, and tells the meter. No Ray."""

from __future__ import annotations

import asyncio
from typing import NoReturn, Protocol

from restoration.engine_port import Vram
from restoration.errors import EngineError
from restoration.observability.metrics import ENGINE_STARTS, ENGINE_UP, VRAM_FREE, VRAM_TOTAL, Meter

PERIOD_S = 5.0


class WatchedEngine(Protocol):
    """What of an engine is watched."""

    @property
    def starts(self) -> int: ...

    async def vram(self) -> Vram | None: ...


class EngineWatch:
    """Watches as long as `run` does."""

    def __init__(self, engine: WatchedEngine, meter: Meter, period_s: float = PERIOD_S) -> None:
        self._engine = engine
        self._meter = meter
        self._period_s = period_s
        self._starts = 0

    async def run(self) -> NoReturn:
        while True:
            await self.look()
            await asyncio.sleep(self._period_s)

    async def look(self) -> None:
        """One look: whether it answers, how often it was started, and its GPU's memory."""
        try:
            vram = await self._engine.vram()
        except EngineError:  # whoever runs jobs on it sees to that, and logs it
            self._meter.gauge(ENGINE_UP, 0)
        else:
            self._meter.gauge(ENGINE_UP, 1)
            if vram is not None:
                self._meter.gauge(VRAM_TOTAL, vram.total_bytes)
                self._meter.gauge(VRAM_FREE, vram.free_bytes)
        more, self._starts = self._engine.starts - self._starts, self._engine.starts
        self._meter.count(ENGINE_STARTS, amount=more)
