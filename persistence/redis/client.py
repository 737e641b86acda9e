"""Connections to Redis, and the conversion of its errors."""

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
    """Return a client that waits `timeout_s` for an answer; it connects on first use.

    It reconnects up to `retries` times to a broken connection, without a delay. Answers are str if
    `text`, else bytes.
    """
    return Redis.from_url(
        url,
        decode_responses=text,
        protocol=2,  # all versions of client and server return answers of the same shape
        driver_info=None,  # otherwise each new connection reads redis-py's version from disk
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_timeout=timeout_s,
        retry=Retry(NoBackoff(), retries, supported_errors=(RedisConnectionError,)),
    )


@contextmanager
def translated_errors() -> Iterator[None]:
    """Convert errors of Redis, and a TimeoutError, to DependencyUnavailable."""
    try:
        yield
    except (RedisError, TimeoutError) as error:
        raise DependencyUnavailable(f"Redis: {error!r}") from error
