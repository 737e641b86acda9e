"""The three policies of fleet size that the simulation compares."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    replica_queue_length_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from restoration.scaling import Demand, Scaler, ScalingPolicy

# Handles report to Serve's controller this often (RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_-
# INTERVAL_S). More frequent decisions would have no new data.
SERVE_REPORTS_EVERY_S = 10.0


class Policy(Protocol):
    """Decides how many workers to run."""

    @property
    def every_s(self) -> float:
        """The interval between decisions, in seconds."""

    def decide(self, demand: Demand, target: int, ready: int, now_s: float) -> int: ...


class Fixed:
    """Runs the number of workers that the peak needs, day and night."""

    every_s = 60.0

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def decide(self, demand: Demand, target: int, ready: int, now_s: float) -> int:
        return self._workers


class Ours:
    """The policy of this project, as it runs in the dispatcher."""

    every_s = 1.0

    def __init__(self, policy: ScalingPolicy) -> None:
        self._scaler = Scaler(policy)

    def decide(self, demand: Demand, target: int, ready: int, now_s: float) -> int:
        return self._scaler.decide(demand, target, now_s)


class ServeDefault:
    """Ray Serve's own code and defaults, apart from the limit, on the number of ongoing requests.

    Ongoing jobs are the waiting and the running ones: one request is one job, as in a service that
    keeps HTTP requests open. The steps follow Ray's `_apply_autoscaling_config`, which cannot be
    used itself because it reads the wall clock.
    """

    every_s = SERVE_REPORTS_EVERY_S

    def __init__(self, max_workers: int) -> None:
        self._config = AutoscalingConfig(max_replicas=max_workers)
        samples = round(self._config.look_back_period_s / self.every_s)
        self._ongoing: deque[int] = deque(maxlen=samples)
        self._state: dict[str, Any] = {}

    def decide(self, demand: Demand, target: int, ready: int, now_s: float) -> int:
        self._ongoing.append(demand.waiting + demand.running)
        ongoing = sum(self._ongoing) / len(self._ongoing)
        context = self._context(ongoing, target, ready, now_s)
        desired, _ = replica_queue_length_autoscaling_policy(context)
        scaled = _apply_scaling_factors(desired, ready, self._config)
        decided, self._state = _apply_delay_logic(
            max(0, scaled), target, self._config, self._state, _now=now_s
        )
        return int(min(max(decided, self._config.min_replicas), self._config.max_replicas))

    def _context(self, ongoing: float, target: int, ready: int, now_s: float) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=DeploymentID("GpuWorker"),
            deployment_name="GpuWorker",
            app_name=None,
            current_num_replicas=ready,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=ongoing,
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )
