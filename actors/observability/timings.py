"""Where an attempt's time goes: stage after stage, and within the engine node after node."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Lap:
    """`name` is a stage, or a node's class; `began_at` is in seconds since the epoch."""

    name: str
    began_at: float
    took_s: float


class Stopwatch:
    """One stage follows another, and so does one node. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epoch_s = time.time() - clock()
        self._stages = _Laps()
        self._nodes = _Laps()
        self._taken_s = 0.0

    @property
    def laps_s(self) -> dict[str, float]:
        """Seconds of each stage that is over."""
        return {lap.name: round(lap.took_s, 4) for lap in self.stages}

    @property
    def stages(self) -> list[Lap]:
        return [self._lap(*lap) for lap in self._stages.over]

    @property
    def nodes(self) -> list[Lap]:
        """The engine's nodes, in the order in which it executed them."""
        return [self._lap(*lap) for lap in self._nodes.over]

    @property
    def gpu_s(self) -> float:
        """For how long the engine has executed the attempt, up to now."""
        over = sum(until - since for name, since, until in self._stages.over if name == ENGINE)
        name, since = self._stages.current
        return over + (self._clock() - since if name == ENGINE else 0.0)

    def take_gpu_s(self) -> float:
        """By how much `gpu_s` has grown since this was asked last."""
        now_s = self.gpu_s
        more_s, self._taken_s = now_s - self._taken_s, now_s
        return more_s

    def enter(self, stage: str) -> None:
        self.stop()
        self._stages.current = (stage, self._clock())

    def enter_node(self, node_class: str) -> None:
        now = self._clock()
        self._nodes.end(now)
        self._nodes.current = (node_class, now)

    def stop(self) -> None:
        """Nothing of the attempt goes on."""
        now = self._clock()
        self._nodes.end(now)
        self._stages.end(now)

    def _lap(self, name: str, since: float, until: float) -> Lap:
        return Lap(name, self._epoch_s + since, until - since)


class _Laps:
    def __init__(self) -> None:
        self.over: list[tuple[str, float, float]] = []
        self.current: tuple[str, float] = ("", 0.0)

    def end(self, now: float) -> None:
        name, since = self.current
        if name:
            self.over.append((name, since, now))
            self.current = ("", 0.0)
