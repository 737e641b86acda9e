"""An in-memory Meter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from restoration.observability.metrics import NO_LABELS, Kind, Metric

Key = tuple[str, frozenset[tuple[str, str]]]


class MemoryMeter:
    """Values by name and labels. It rejects wrong labels and kinds, as Ray does."""

    def __init__(self) -> None:
        self.counts: dict[Key, float] = defaultdict(float)
        self.gauges: dict[Key, float] = {}
        self.values: dict[Key, list[float]] = defaultdict(list)

    def count(
        self, metric: Metric, labels: Mapping[str, str] = NO_LABELS, amount: float = 1
    ) -> None:
        self.counts[_key(metric, Kind.COUNTER, labels)] += amount

    def gauge(self, metric: Metric, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        self.gauges[_key(metric, Kind.GAUGE, labels)] = value

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self.values[_key(metric, Kind.HISTOGRAM, labels)].append(value)

    def counted(self, metric: Metric, **labels: str) -> float:
        """Return the sum over all series with these labels."""
        return sum(value for key, value in self.counts.items() if _matches(key, metric, labels))

    def gauged(self, metric: Metric, **labels: str) -> float:
        return sum(value for key, value in self.gauges.items() if _matches(key, metric, labels))

    def observed(self, metric: Metric, **labels: str) -> list[float]:
        found = (values for key, values in self.values.items() if _matches(key, metric, labels))
        return [value for values in found for value in values]


def _key(metric: Metric, kind: Kind, labels: Mapping[str, str]) -> Key:
    assert metric.kind is kind
    assert set(labels) == set(metric.labels)
    return metric.name, frozenset(labels.items())


def _matches(key: Key, metric: Metric, labels: Mapping[str, str]) -> bool:
    return key[0] == metric.name and labels.items() <= dict(key[1]).items()
