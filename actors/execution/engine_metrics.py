"""Polls a worker's engine every few seconds and sets its metrics. No Ray."""

from __future__ import annotations

import asyncio
from typing import NoReturn, Protocol

from restoration.engine_port import Vram
from restoration.errors import EngineError
from restoration.observability.metrics import ENGINE_STARTS, ENGINE_UP, VRAM_FREE, VRAM_TOTAL, Meter

PERIOD_S = 5.0


class MeasuredEngine(Protocol):
    """The part of an engine that EngineMetrics reads."""

    @property
    def starts(self) -> int: ...

    async def vram(self) -> Vram | None: ...


class EngineMetrics:
    """Sets the metrics of one engine while `run` runs."""

    def __init__(self, engine: MeasuredEngine, meter: Meter, period_s: float = PERIOD_S) -> None:
        self._engine = engine
        self._meter = meter
        self._period_s = period_s
        self._starts = 0

    async def run(self) -> NoReturn:
        while True:
            await self.update()
            await asyncio.sleep(self._period_s)

    async def update(self) -> None:
        """Update the metrics once: whether the engine responds, its starts, its GPU's memory."""
        try:
            vram = await self._engine.vram()
        except EngineError:  # the worker's health check restarts the engine and logs it
            self._meter.gauge(ENGINE_UP, 0)
        else:
            self._meter.gauge(ENGINE_UP, 1)
            if vram is not None:
                self._meter.gauge(VRAM_TOTAL, vram.total_bytes)
                self._meter.gauge(VRAM_FREE, vram.free_bytes)
        more, self._starts = self._engine.starts - self._starts, self._engine.starts
        self._meter.count(ENGINE_STARTS, amount=more)
