"""Implements Meter with Ray's metrics: each process reports to its node's agent for Prometheus.

Ray labels each series with the process as `WorkerId`, so that two replicas on one node never write
the same series. It drops a gauge that is not set again within two reports (20 s), so a thread sets
all gauges repeatedly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import NoReturn

from ray.util.metrics import Counter, Gauge, Histogram

from restoration.observability.metrics import METRICS, NO_LABELS, Kind, Metric

GAUGES_AGAIN_S = 5.0

_Series = tuple[Metric, tuple[tuple[str, str], ...]]


class RayMeter:
    """A Meter. Create one for each process: Ray keeps only the first metric of a name."""

    def __init__(self) -> None:
        self._counters = {
            m: Counter(m.name, m.meaning, m.labels) for m in METRICS if m.kind is Kind.COUNTER
        }
        self._gauges = {
            m: Gauge(m.name, m.meaning, m.labels) for m in METRICS if m.kind is Kind.GAUGE
        }
        self._histograms = {
            m: Histogram(m.name, m.meaning, list(m.buckets), m.labels)
            for m in METRICS
            if m.kind is Kind.HISTOGRAM
        }
        self._last: dict[_Series, float] = {}
        threading.Thread(target=self._repeat_gauges, name="gauges", daemon=True).start()

    def count(
        self, metric: Metric, labels: Mapping[str, str] = NO_LABELS, amount: float = 1
    ) -> None:
        if amount > 0:
            self._counters[metric].inc(amount, dict(labels))

    def gauge(self, metric: Metric, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        self._last[metric, tuple(labels.items())] = value
        self._gauges[metric].set(value, dict(labels))

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._histograms[metric].observe(value, dict(labels))

    def _repeat_gauges(self) -> NoReturn:
        while True:
            time.sleep(GAUGES_AGAIN_S)
            for (metric, labels), value in tuple(self._last.items()):
                self._gauges[metric].set(value, dict(labels))
