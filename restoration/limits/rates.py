"""How many requests an owner has left, and how answers tell it.

The headers are those of draft-ietf-httpapi-ratelimit-headers-10, whose parameters are: `q` the
quota, `w` its window in seconds, `r` what is left of it, `t` the seconds until there is more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Rate:
    """`wait_s`: until one more request is allowed, if this one was not, else until all are."""

    per_minute: int
    left: int
    wait_s: float
    allowed: bool = True

    @property
    def retry_after_s(self) -> int:
        return max(1, math.ceil(self.wait_s))

    def headers(self) -> Mapping[str, str]:
        return {
            "RateLimit-Policy": f'"requests";q={self.per_minute};w={WINDOW_S}',
            "RateLimit": f'"requests";r={self.left};t={math.ceil(self.wait_s)}',
        }
