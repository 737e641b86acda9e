"""Observers of attempts: receive each attempt's stages, outcome and GPU time.

They read the attempt's stopwatch afterwards, so that the execution contains no metrics code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from actors.observability.timings import ENGINE, Lap, Stopwatch
from restoration.jobs import Job
from restoration.observability.metrics import ATTEMPTS, GPU_BUSY, STAGES, Meter

NO_CODE, LOST = "none", "lost"
# All nodes of ComfyUI that read models from disk have it in their names; LoadImage does not.
_LOADER = "Loader"


class Observer(Protocol):
    def executed(self, job: Job, gpu_s: float, more_s: float) -> None:
        """The engine has executed the attempt for `gpu_s` seconds, `more_s` since the last call."""

    def ended(self, job: Job, watch: Stopwatch, ended: Job | None) -> None:
        """The attempt is over. `job`: as claimed; `ended`: as updated, or None if not recorded."""


class Observers:
    """Calls any number of observers in turn."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def executed(self, job: Job, gpu_s: float, more_s: float) -> None:
        for observer in self._observers:
            observer.executed(job, gpu_s, more_s)

    def ended(self, job: Job, watch: Stopwatch, ended: Job | None) -> None:
        for observer in self._observers:
            observer.ended(job, watch, ended)


class MetricsObserver:
    """Sets the metrics of attempts."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def executed(self, job: Job, gpu_s: float, more_s: float) -> None:
        self._meter.count(GPU_BUSY, {"workflow": job.workflow}, more_s)

    def ended(self, job: Job, watch: Stopwatch, ended: Job | None) -> None:
        outcome, code = how_it_ended(ended)
        labels = {"outcome": outcome, "code": code, "workflow": job.workflow}
        self._meter.count(ATTEMPTS, labels)
        stages = {lap.name: lap.took_s for lap in watch.stages}
        if (executed_s := stages.pop(ENGINE, None)) is not None:
            stages["load"] = load_s = loading_s(watch.nodes)
            stages["execute"] = max(0.0, executed_s - load_s)
        for stage, took_s in {"queue": queued_s(job), **stages}.items():
            self._meter.observe(STAGES, took_s, {"stage": stage, "workflow": job.workflow})


def how_it_ended(ended: Job | None) -> tuple[str, str]:
    """Return the outcome and the error code, as labels of metrics."""
    if ended is None or not ended.attempts:
        return LOST, NO_CODE
    last = ended.attempts[-1]
    return last.outcome.value, last.code or NO_CODE


def loading_s(nodes: Iterable[Lap]) -> float:
    return sum(node.took_s for node in nodes if _LOADER in node.name)


def queued_s(job: Job) -> float:
    """Return the seconds from the time at which the job could be claimed to its claim."""
    if job.started_at is None:
        return 0.0
    return max(0.0, (job.started_at - job.available_at).total_seconds())
