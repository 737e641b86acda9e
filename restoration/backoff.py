"""Exponential backoff with jitter."""

from __future__ import annotations

import random

# Keeps 2.0**doublings from overflowing a float; no delay is meant to be 2^30 times its first.
_MOST_DOUBLINGS = 30


def backoff_s(first_s: float, longest_s: float, doublings: int) -> float:
    """Return the seconds to wait before the next try.

    The ceiling is `first_s` doubled `doublings` times, at most `longest_s`. The result is random
    between half of it and all of it, so that callers that failed together retry apart.
    """
    ceiling_s = min(longest_s, first_s * 2.0 ** min(doublings, _MOST_DOUBLINGS))
    return random.uniform(ceiling_s / 2, ceiling_s)  # noqa: S311 - jitter, not a secret
