"""Figures of benchmarks, their goals, and the resources that benchmarks share.

A sample is the ratio of two things measured one after the other in the same run, or a time that
such a ratio explains. The value of a figure is the median of its samples, and its spread their
extremes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from persistence.embedded.local import LocalServices, Role
from serve_app.local.stack import service_variables
from serve_app.local.temporary import LocalStack, temporary_stack

HERE = Path(__file__).parent
WORKFLOWS = HERE / "workflows"


@dataclass(frozen=True, slots=True)
class Goal:
    """A lower or upper `bound`. It is missed only if the value is off by more than `tolerance`, a
    share of the bound that reflects how well such a figure repeats."""

    bound: float
    at_least: bool
    tolerance: float = 0.05

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def missed(self, value: float) -> bool:
        slack = self.bound * self.tolerance
        return not self.met(value + slack if self.at_least else value - slack)

    def reach(self, value: float) -> float:
        """Return how good `value` is as a factor: 1 at the goal, 2 twice as good, near 0 far from
        it."""
        if self.at_least:
            return value / self.bound
        if value <= 0:
            return math.inf if self.bound else 1.0
        return self.bound / value

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """`unit` is empty for a ratio. `parts` shows the two sides of the ratio to the reader."""

    name: str
    samples: Sequence[float]
    goal: Goal
    unit: str = ""
    parts: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.samples), max(self.samples)

    @property
    def met(self) -> bool:
        return self.goal.met(self.value)

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "spread": [round(end, 4) for end in self.spread],
            "goal": str(self.goal),
            "met": self.met,
            "unit": self.unit,
            "parts": self.parts,
        }


@dataclass
class Bench:
    """Resources shared by the benchmarks of one run; `resources` stops all that were started."""

    say: Callable[[str], None]
    resources: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def environ(self) -> dict[str, str]:
        """Return the settings of the Postgres, Valkey and S3 that compared services share."""
        return self.resources.enter_context(new_services())

    @cached_property
    def stack(self) -> LocalStack:
        """Return a service with one worker, on `environ`."""
        self.say("starting a stack")
        return self.resources.enter_context(_stack(1, self.environ, WORKFLOWS))

    @contextmanager
    def new_stack(
        self, workers: int, changes: Mapping[str, str], workflows: Path = WORKFLOWS
    ) -> Iterator[LocalStack]:
        """Start another service, with its own Postgres, Valkey and S3. On shared ones, one
        dispatcher would lead, and its workers would do all the jobs."""
        self.say(f"starting a stack, workers: {workers}")
        with new_services() as environ, _stack(workers, {**environ, **changes}, workflows) as stack:
            yield stack


@contextmanager
def _stack(workers: int, environ: Mapping[str, str], workflows: Path) -> Iterator[LocalStack]:
    """Run a service behind HAProxy, as in a cluster, unless `environ` says otherwise."""
    environ = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        **environ,
        "WORKFLOWS_DIR": str(workflows),
        "CUSTOM_NODES_DIR": str(HERE),
    }
    with temporary_stack(workers, environ) as stack:
        yield stack


@contextmanager
def new_services() -> Iterator[dict[str, str]]:
    """Run Postgres, Valkey and S3, and yield the settings with their addresses."""
    with (
        TemporaryDirectory(prefix="comfy-bench-", ignore_cleanup_errors=True) as folder,
        LocalServices(Path(folder)) as services,
    ):
        yield {
            name: value
            for role in get_args(Role)
            for name, value in service_variables(role, services.urls).items()
        }


Benchmark = Callable[[Bench], Sequence[Figure]]
