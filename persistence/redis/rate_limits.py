"""Requests a minute of each owner, in Redis: one script, one round trip, and no state of ours.

The generic cell rate algorithm (ITU-T I.371, as in https://brandur.org/rate-limiting): what is
kept is only the moment at which a bucket that fills evenly would be full again. A whole minute's
requests may come at once. Redis' own clock counts, so that replicas need not agree on the time.
"""

from __future__ import annotations

import asyncio

from persistence.redis.client import connect, translated_errors
from restoration.limits.rates import WINDOW_S, Rate

# A request would rather go uncounted than wait longer for this.
_TIMEOUT_S = 0.25

# Times are in microseconds, which Lua's numbers hold exactly. Returns what is left, or -1 for a
# refusal; and the microseconds until there is one more, after a refusal, or all of it again.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local window = tonumber(ARGV[2])
local step = window / tonumber(ARGV[1])
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now) + step
if full_at - now > window + 0.5 then
  return {-1, math.ceil(full_at - now - window)}
end
redis.call('SET', KEYS[1], string.format('%.0f', full_at), 'PX', math.ceil((full_at - now) / 1000))
return {math.floor((window - (full_at - now)) / step + 0.001), math.ceil(full_at - now)}
"""


class RedisRateLimiter:
    """Belongs to one event loop: the one it is made in. Connects on first use."""

    def __init__(self, redis_url: str) -> None:
        self._redis = connect(redis_url, timeout_s=_TIMEOUT_S, retries=0)

    async def take(self, owner: str, per_minute: int) -> Rate:
        """As the port says. Raises DependencyUnavailable after a quarter of a second."""
        window_us = WINDOW_S * 1_000_000
        with translated_errors():
            # EVAL rather than EVALSHA: no second round trip when a new server lacks the script
            async with asyncio.timeout(_TIMEOUT_S):
                left, wait_us = await self._redis.eval(
                    _TAKE, 1, f"restore:rate:{owner}", str(per_minute), str(window_us)
                )
        return Rate(per_minute, max(left, 0), wait_us / 1_000_000, allowed=left >= 0)

    async def aclose(self) -> None:
        await self._redis.aclose()
