"""The wait before the next start of a service that keeps failing."""

from __future__ import annotations

import pytest

from persistence.embedded.keeper import Pace


def test_backoff_doubles_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait doubles from 0.2 s to at most 15 s, however often it fails; jitter takes up to half
    of it."""
    ceilings = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]
    for choice, share in ((max, 1.0), (min, 0.5)):
        monkeypatch.setattr("random.uniform", lambda low, high, pick=choice: pick(low, high))
        waits = [Pace().backoff_s(failures) for failures in range(1, 10)]
        assert waits == [share * ceiling for ceiling in ceilings]
        assert Pace().backoff_s(10_000) == share * 15.0
