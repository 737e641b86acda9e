"""How many GPU workers the demand asks for, and when to act on it; pure.

Demand is jobs that wait and jobs in hand, never HTTP requests. Each interactive job wants a
worker to itself at once; batch jobs may share one, `jobs_per_worker` of them in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from restoration.errors import InvalidSettings


@dataclass(frozen=True, slots=True)
class Demand:
    """Jobs of all classes; the interactive ones are counted among `waiting` and `running`."""

    waiting: int
    running: int
    interactive_waiting: int
    interactive_running: int


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """Limits, targets and delays. Raises InvalidSettings if they contradict each other.

    `warm_workers` are kept beyond those that the demand asks for, so that the next interactive
    job finds one without work; `min_workers` counts all. Both 0: no worker while there is no job.
    """

    jobs_per_worker: float
    min_workers: int
    max_workers: int
    warm_workers: int
    upscale_delay_s: float
    downscale_delay_s: float

    def __post_init__(self) -> None:
        if self.jobs_per_worker <= 0:
            raise InvalidSettings("jobs_per_worker must be above 0")
        if not 0 <= self.min_workers <= self.max_workers:
            raise InvalidSettings("min_workers must be between 0 and max_workers")
        if self.warm_workers < 0 or self.upscale_delay_s < 0 or self.downscale_delay_s < 0:
            raise InvalidSettings("warm_workers and the delays cannot be negative")


def wanted_workers(policy: ScalingPolicy, demand: Demand, current: int) -> int:
    """How many workers there should be, all at once, where there are `current` now.

    With several batch jobs to a worker, a queue that gets shorter asks for fewer workers than are
    at work; those keep theirs, since Serve does not choose an idle one to stop.
    """
    interactive = demand.interactive_waiting + demand.interactive_running
    batch = demand.waiting + demand.running - interactive
    needed = ceil(interactive + batch / policy.jobs_per_worker)
    at_work = min(demand.running, current)
    wanted = max(needed, at_work) + policy.warm_workers
    return min(max(wanted, policy.min_workers), policy.max_workers)


class Scaler:
    """Follows what is wanted, each way only once it has been wanted for that way's delay."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self._policy = policy
        self._up_since: float | None = None
        self._down_since: float | None = None
        self._most = 0  # that was wanted since `_down_since`

    def decide(self, demand: Demand, current: int, now_s: float) -> int:
        """The number of workers to have from now on; `now_s` is any clock that only goes on.

        Fewer are had only as far as none of the decisions within the delay wanted more.
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
