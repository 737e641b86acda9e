"""How many event streams this replica of the ingress holds open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from restoration.metrics import SSE_CLIENTS, Meter


class OpenStreams:
    """Counts, and tells the meter."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._open = 0
        meter.gauge(SSE_CLIENTS, 0)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """For as long as the block lasts."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def _add(self, more: int) -> None:
        self._open += more
        self._meter.gauge(SSE_CLIENTS, self._open)
