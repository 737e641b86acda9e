"""What is to be broken, and the breaking of it: one fault at a time, some seconds apart."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.faults import BY_KIND, Fault, Strike, shuffled, strike
from tests.chaos.processes import StackProcesses

VICTIM_S = 300.0  # what the last fault has taken is back by then, on a slow machine too


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, how hard, and with which chances.

    `kinds` of faults are struck once each, in this order, however long that takes; without any,
    all there are, in an order of chance, for `seconds`.
    """

    seconds: float = math.inf
    seed: int = 0
    kinds: tuple[str, ...] = ()
    workers: int = 2
    lease_s: float = 4.0
    faults_every_s: float = 5.0
    http_every_s: float = 1.0
    http_at_most: int = 12
    stuck_s: float = 120.0  # without any job's end, once nothing is broken any more
    logs: Path | None = None

    def faults(self, rng: random.Random) -> Iterator[Fault]:
        return (BY_KIND[kind] for kind in self.kinds) if self.kinds else shuffled(rng)


def break_things(
    plan: Plan, processes: StackProcesses, tell: Callable[[str], None]
) -> list[Strike]:
    """A fault every few seconds, until the plan's faults or its time are used up."""
    rng = random.Random(plan.seed)  # noqa: S311 - chance, not a secret
    began = time.monotonic()
    strikes = []
    pause = threading.Event()
    for fault in plan.faults(rng):
        pause.wait(plan.faults_every_s * rng.uniform(0.5, 1.5))
        elapsed_s = time.monotonic() - began
        if elapsed_s > plan.seconds:
            break
        try:
            strikes.append(_strike_once_possible(fault, processes, rng))
        except OSError as error:
            tell(f"{elapsed_s:6.1f} s  {fault.kind}: NOT DONE: {error}")
        else:
            tell(f"{elapsed_s:6.1f} s  {fault.kind}: {strikes[-1].detail}")
    return strikes


def _strike_once_possible(fault: Fault, processes: StackProcesses, rng: random.Random) -> Strike:
    """Raises OSError when the fault could not be done, or had nothing to hit for VICTIM_S."""
    until = time.monotonic() + VICTIM_S
    pause = threading.Event()
    while time.monotonic() < until:
        if (happened := strike(fault, processes, rng)) is not None:
            return happened
        pause.wait(0.5)
    raise ProcessLookupError("nothing to hit")
