"""Count and limit the event streams that a replica of the ingress holds open for each owner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from restoration.limits.fair_places import FairPlaces, as_many_as_are_free
from restoration.observability.metrics import SSE_CLIENTS, Meter


class OpenStreams:
    """Counts open streams, for the gauge and for the limit. Belongs to one event loop."""

    def __init__(self, meter: Meter, limit: int) -> None:
        self._meter = meter
        self._limit = limit
        self._places = FairPlaces(limit, "event streams", as_many_as_are_free)
        self._count()

    @contextmanager
    def one_more(self, owner: str) -> Iterator[None]:
        """Count a stream of the owner within the block. Raises TooManyAtOnce."""
        place = self._places.take_now(owner)
        self._count()
        try:
            yield
        finally:
            place.give_back()
            self._count()

    def _count(self) -> None:
        self._meter.gauge(SSE_CLIENTS, self._limit - self._places.free)
