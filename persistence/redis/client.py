"""How this package connects to Redis, and what errors become; `database` has that of Postgres."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from restoration.errors import DependencyUnavailable

_CONNECT_TIMEOUT_S = 1.0


def connect(url: str, *, timeout_s: float, retries: int, text: bool = True) -> Redis:
    """A client that gives up on an answer after `timeout_s`, and on a broken connection after
    `retries` new ones, at once each. Answers are text, or bytes."""
    return Redis.from_url(
        url,
        decode_responses=text,
        protocol=2,  # the same shape of answers from every version of client and server
        driver_info=None,  # else each new connection reads redis-py's version from the disk
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_timeout=timeout_s,
        retry=Retry(NoBackoff(), retries, supported_errors=(RedisConnectionError,)),
    )


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raises DependencyUnavailable for any error of Redis, and for an answer that came too late."""
    try:
        yield
    except (RedisError, TimeoutError) as error:
        raise DependencyUnavailable(f"Redis: {error!r}") from error
