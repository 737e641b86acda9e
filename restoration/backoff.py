"""Exponential backoff with jitter: how long to wait before something is tried again."""

from __future__ import annotations

import random

# Beyond it a float has no power of two. No delay was ever meant to be 2^30 times its first.
_MOST_DOUBLINGS = 30


def backoff_s(first_s: float, longest_s: float, doublings: int) -> float:
    """Seconds to wait: `first_s` doubled so many times, but at most `longest_s`; of that a random
    share from one half to the whole, so that what failed together does not try again together."""
    ceiling_s = min(longest_s, first_s * 2.0 ** min(doublings, _MOST_DOUBLINGS))
    return random.uniform(ceiling_s / 2, ceiling_s)  # noqa: S311 - jitter, not a secret
