"""Strike a stack with planned or random faults, one at a time, some seconds apart."""

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

VICTIM_S = 300.0  # A part lost to the last fault is back by then, even on a slow machine.


@dataclass(frozen=True, slots=True)
class Plan:
    """Duration, faults and load of a chaos run.

    With `kinds`, each of these faults is struck once, in this order, however long that takes.
    Without, all faults are struck in random order for `seconds`.
    """

    seconds: float = math.inf
    seed: int = 0
    kinds: tuple[str, ...] = ()
    workers: int = 2
    lease_s: float = 4.0
    faults_every_s: float = 5.0
    http_every_s: float = 1.0
    http_at_most: int = 12
    stuck_s: float = 120.0  # without the end of any job, after the last fault
    logs: Path | None = None

    def faults(self, rng: random.Random) -> Iterator[Fault]:
        return (BY_KIND[kind] for kind in self.kinds) if self.kinds else shuffled(rng)


def break_things(
    plan: Plan, processes: StackProcesses, tell: Callable[[str], None]
) -> list[Strike]:
    """Strike a fault every few seconds, until the plan's faults or its time are used up."""
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
    """Wait for a victim and strike it.

    Raises OSError if the fault failed, or found no victim for VICTIM_S.
    """
    until = time.monotonic() + VICTIM_S
    pause = threading.Event()
    while time.monotonic() < until:
        if (happened := strike(fault, processes, rng)) is not None:
            return happened
        pause.wait(0.5)
    raise ProcessLookupError("nothing to hit")
