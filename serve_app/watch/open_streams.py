"""The event streams that this replica of the ingress holds open, and how many an owner may have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from restoration.limits.fair_places import FairPlaces, as_many_as_are_free
from restoration.observability.metrics import SSE_CLIENTS, Meter


class OpenStreams:
    """Counts them, for the meter and for the limit. For one event loop."""

    def __init__(self, meter: Meter, limit: int) -> None:
        self._meter = meter
        self._limit = limit
        self._places = FairPlaces(limit, "event streams", as_many_as_are_free)
        self._count()

    @contextmanager
    def one_more(self, owner: str) -> Iterator[None]:
        """Count a stream of the owner for the block. Raises TooManyAtOnce."""
        place = self._places.take_now(owner)
        self._count()
        try:
            yield
        finally:
            place.give_back()
            self._count()

    def _count(self) -> None:
        self._meter.gauge(SSE_CLIENTS, self._limit - self._places.free)
