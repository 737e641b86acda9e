"""How long a service that keeps failing waits for its next start."""

from __future__ import annotations

from persistence.embedded.keeper import Pace


def test_backoff_doubles_up_to_its_limit() -> None:
    """From 0.2 s to 15 s, doubling, less a jitter of up to a half; never more, however often."""
    ceilings = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]
    for failures, ceiling in enumerate(ceilings, start=1):
        assert ceiling / 2 <= Pace().backoff_s(failures) <= ceiling
    assert 7.5 <= Pace().backoff_s(10_000) <= 15.0
