"""The state of an owner's rate limit, its response headers, and the port that counts.

The headers follow draft-ietf-httpapi-ratelimit-headers-10. Their parameters are `q`, the quota;
`w`, its window in seconds; `r`, the remaining quota; and `t`, the seconds until there is more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Rate:
    """The state of one owner's limit after a request.

    `wait_s` is the time until the next request is allowed, if this one was not, and otherwise
    until the whole quota is available.
    """

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


class RateLimiter(Protocol):
    """Counts requests per owner over all replicas. Losing the counts has no other effect."""

    async def take(self, owner: str, per_minute: int) -> Rate:
        """Count a request and return the state. A request over the limit is not counted."""
