"""Definitions of all metrics, and the Meter port that records them.

Names follow Prometheus' conventions; Ray's metrics agent, which serves them, prefixes `ray_`.
Every label has a bounded set of values, so owners appear only by class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

PREFIX = "ray_"  # Ray adds it to every metric


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric. `buckets` are a histogram's upper bounds; a `gpu_only` one needs a GPU."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()
    gpu_only: bool = False

    @property
    def exported(self) -> str:
        """Name at the metrics agent. The series of a histogram add a suffix to it."""
        return PREFIX + self.name


_OF_JOBS = ("class", "owner_class", "workflow")
# From a small picture on a GPU to the longest time limit of a workflow.
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600)

JOBS = Metric("restore_jobs", Kind.GAUGE, ("state", *_OF_JOBS), "Jobs that have not ended")
OLDEST_WAITING = Metric(
    "restore_oldest_waiting_age_seconds",
    Kind.GAUGE,
    ("class",),
    "Age of the oldest waiting job, since its submission; 0 if no job waits",
)
JOBS_FINISHED = Metric(
    "restore_jobs_finished_total", Kind.COUNTER, ("state", *_OF_JOBS), "Jobs that have ended"
)
DISPATCHER_LEADS = Metric(
    "restore_dispatcher_leads", Kind.GAUGE, (), "1 in the leading dispatcher, 0 in the others"
)
ATTEMPTS = Metric(
    "restore_attempts_total",
    Kind.COUNTER,
    ("outcome", "code", "workflow"),
    "Ended attempts: `succeeded`, `failed`, `cancelled`, `handed_back`, or `lost`; `code` "
    "is the error's code, or `none`",
)
STAGES = Metric(
    "restore_stage_duration_seconds",
    Kind.HISTOGRAM,
    ("stage", "workflow"),
    "Time that an attempt spent in a stage: `queue`, `fetch`, `staged` (queued in the "
    "engine), `load` (nodes that load models), `execute` (all other nodes), `encode`, "
    "`store`, `finish` (recording the outcome)",
    _SECONDS,
)
GPU_BUSY = Metric(
    "restore_gpu_busy_seconds_total",
    Kind.COUNTER,
    ("workflow",),
    "Time during which an engine executed a job, whatever its outcome",
)
ENGINE_UP = Metric(
    "restore_engine_up", Kind.GAUGE, (), "1 for each worker whose engine responds, 0 if it does not"
)
ENGINE_STARTS = Metric(
    "restore_engine_starts_total",
    Kind.COUNTER,
    (),
    "Engine starts, including the first of each worker",
)
VRAM_TOTAL = Metric(
    "restore_vram_total_bytes", Kind.GAUGE, (), "Total memory of an engine's GPU", gpu_only=True
)
VRAM_FREE = Metric(
    "restore_vram_free_bytes", Kind.GAUGE, (), "Free memory of an engine's GPU", gpu_only=True
)
WEBHOOKS = Metric(
    "restore_webhook_tries_total",
    Kind.COUNTER,
    ("outcome",),
    "Tries to deliver a webhook: `delivered`, `failed` (will be retried), `dead` (given up)",
)
SSE_CLIENTS = Metric(
    "restore_sse_clients", Kind.GAUGE, (), "Event streams that an ingress replica holds open"
)
REFUSED = Metric(
    "restore_requests_refused_total",
    Kind.COUNTER,
    ("code",),
    "Refused requests other than GET, HEAD and OPTIONS, by the problem's `code`",
)

METRICS: tuple[Metric, ...] = (
    JOBS,
    OLDEST_WAITING,
    JOBS_FINISHED,
    DISPATCHER_LEADS,
    ATTEMPTS,
    STAGES,
    GPU_BUSY,
    ENGINE_UP,
    ENGINE_STARTS,
    VRAM_TOTAL,
    VRAM_FREE,
    WEBHOOKS,
    SSE_CLIENTS,
    REFUSED,
)

NO_LABELS: Mapping[str, str] = {}


class Meter(Protocol):
    """Records measurements without blocking or raising. Callers pass all labels of a metric."""

    def count(
        self, metric: Metric, labels: Mapping[str, str] = NO_LABELS, amount: float = 1
    ) -> None:
        """Add `amount` to a counter. An amount of 0 has no effect."""

    def gauge(self, metric: Metric, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Set a gauge's value for this process."""

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Add a value to a histogram."""


class NullMeter:
    """A meter that records nothing."""

    def count(
        self, metric: Metric, labels: Mapping[str, str] = NO_LABELS, amount: float = 1
    ) -> None: ...

    def gauge(
        self, metric: Metric, value: float, labels: Mapping[str, str] = NO_LABELS
    ) -> None: ...

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None: ...
