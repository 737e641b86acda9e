"""How long a service that keeps failing waits for its next start."""

from __future__ import annotations

from persistence.embedded.keeper import Pace


def test_backoff_doubles_up_to_its_limit() -> None:
    """From 0.2 s to 15 s, doubling, and never beyond however often it fails."""
    waits = [Pace().backoff_s(failures) for failures in range(1, 10)]
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]
    assert Pace().backoff_s(10_000) == 15.0
