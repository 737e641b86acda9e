"""Measures the stages of an attempt, and the nodes that the engine executes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Lap:
    """A finished stage or node. `name`: the stage or node class; `began_at`: epoch seconds."""

    name: str
    began_at: float
    took_s: float


class Stopwatch:
    """Measures consecutive stages, and consecutive nodes. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epoch_s = time.time() - clock()
        self._stages = _Laps()
        self._nodes = _Laps()
        self._taken_s = 0.0

    @property
    def laps_s(self) -> dict[str, float]:
        """The seconds of each finished stage."""
        return {lap.name: round(lap.took_s, 4) for lap in self.stages}

    @property
    def stages(self) -> list[Lap]:
        return [self._lap(*lap) for lap in self._stages.over]

    @property
    def nodes(self) -> list[Lap]:
        """The finished nodes, in the order of execution."""
        return [self._lap(*lap) for lap in self._nodes.over]

    @property
    def gpu_s(self) -> float:
        """The seconds that the engine has executed the attempt, up to now."""
        over = sum(until - since for name, since, until in self._stages.over if name == ENGINE)
        name, since = self._stages.current
        return over + (self._clock() - since if name == ENGINE else 0.0)

    def take_gpu_s(self) -> float:
        """Return the growth of `gpu_s` since the previous call."""
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
        """End the current stage and the current node."""
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
