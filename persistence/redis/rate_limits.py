"""Limit each owner's requests per minute in Redis, with one script in one round trip.

This is the generic cell rate algorithm (ITU-T I.371, see https://brandur.org/rate-limiting). It
stores only the time at which an evenly refilled bucket would be full again. A burst may use a whole
minute's requests. Times are of Redis' clock, so that replicas need not agree.
"""

from __future__ import annotations

import asyncio

from persistence.redis.client import connect, translated_errors
from restoration.limits.rates import WINDOW_S, Rate

# A request goes uncounted rather than wait longer.
_TIMEOUT_S = 0.25

# Times are in microseconds, which Lua's numbers hold exactly. Returns the remaining requests, or -1
# if refused, and the microseconds until the next request is allowed, if refused, or until all are.
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
    """RateLimiter on Redis, bound to the event loop in which it is created.

    It connects on first use.
    """

    def __init__(self, redis_url: str) -> None:
        self._redis = connect(redis_url, timeout_s=_TIMEOUT_S, retries=0)

    async def take(self, owner: str, per_minute: int) -> Rate:
        """See RateLimiter. Raises DependencyUnavailable after 0.25 s without an answer."""
        window_us = WINDOW_S * 1_000_000
        with translated_errors():
            # EVAL instead of EVALSHA saves the second round trip to a server without the script.
            async with asyncio.timeout(_TIMEOUT_S):
                left, wait_us = await self._redis.eval(
                    _TAKE, 1, f"restore:rate:{owner}", str(per_minute), str(window_us)
                )
        return Rate(per_minute, max(left, 0), wait_us / 1_000_000, allowed=left >= 0)

    async def aclose(self) -> None:
        await self._redis.aclose()
