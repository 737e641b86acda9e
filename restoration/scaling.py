"""Compute the number of GPU workers from the demand, with delays. No I/O.

Demand is the numbers of waiting and running jobs, not HTTP requests. Each interactive job needs its
own worker at once; batch jobs share one, `jobs_per_worker` each.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from restoration.errors import InvalidSettings


@dataclass(frozen=True, slots=True)
class Demand:
    """Numbers of jobs. `waiting` and `running` include the interactive ones."""

    waiting: int
    running: int
    interactive_waiting: int
    interactive_running: int


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """Limits, targets and delays. Raises InvalidSettings if they contradict each other.

    `warm_workers` are kept in addition to those that the demand needs, so that the next interactive
    job finds an idle one. `min_workers` counts all workers. With both 0, no worker runs without a
    job.
    """

    jobs_per_worker: float
    min_workers: int
    max_workers: int
    warm_workers: int
    upscale_delay_s: float
    downscale_delay_s: float

    def __post_init__(self) -> None:
        if self.jobs_per_worker <= 0:
            raise InvalidSettings("jobs_per_worker must be greater than 0")
        if not 0 <= self.min_workers <= self.max_workers:
            raise InvalidSettings("min_workers must be between 0 and max_workers")
        if self.warm_workers < 0 or self.upscale_delay_s < 0 or self.downscale_delay_s < 0:
            raise InvalidSettings("warm_workers and the delays cannot be negative")


def wanted_workers(policy: ScalingPolicy, demand: Demand, current: int) -> int:
    """Return the number of workers for the demand, without delays; `current` run now.

    With several batch jobs to a worker, a short queue needs fewer workers than are busy. Busy
    workers are kept, because Serve may stop a busy one rather than an idle one.
    """
    interactive = demand.interactive_waiting + demand.interactive_running
    batch = demand.waiting + demand.running - interactive
    needed = ceil(interactive + batch / policy.jobs_per_worker)
    at_work = min(demand.running, current)
    wanted = max(needed, at_work) + policy.warm_workers
    return min(max(wanted, policy.min_workers), policy.max_workers)


class Scaler:
    """Scales up or down once the demand has asked for it for that direction's delay."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self._policy = policy
        self._up_since: float | None = None
        self._down_since: float | None = None
        self._most = 0  # largest number wanted since `_down_since`

    def decide(self, demand: Demand, current: int, now_s: float) -> int:
        """Return the new number of workers. `now_s` is the time of any monotonic clock.

        Scaling down goes to the largest number wanted within the delay.
        """
        wanted = wanted_workers(self._policy, demand, current)
        if wanted <= current:
            self._up_since = None
        elif self._up_since is None:
            self._up_since = now_s
        if wanted >= current:
            self._down_since = None
        elif self._down_since is None:
            self._down_since, self._most = now_s, wanted
        else:
            self._most = max(self._most, wanted)
        if self._up_since is not None and now_s - self._up_since >= self._policy.upscale_delay_s:
            return wanted
        if self._down_since is not None and (
            now_s - self._down_since >= self._policy.downscale_delay_s
        ):
            self._down_since = None
            return self._most
        return current
