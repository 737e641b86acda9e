"""Point 8: Postgres, Redis and S3 want their passwords, and TLS where their URL asks for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import make_url, text

from persistence.blobs import S3BlobStore
from persistence.database import Database
from persistence.embedded.local import LocalServices
from persistence.status import RedisStatusBoard
from restoration.errors import DependencyUnavailable
from tests.conftest import S3Access


async def _ask_postgres(url: str) -> None:
    database = Database(url, pool_size=1)
    try:
        await database.run(lambda connection: connection.execute(text("SELECT 1")))
    finally:
        await database.aclose()


async def _ask_redis(url: str) -> None:
    board = RedisStatusBoard(url)
    try:
        await board.ping()
    finally:
        await board.aclose()


async def _ask_s3(access: S3Access) -> None:
    blobs = S3BlobStore(
        access.bucket,
        endpoint_url=access.endpoint_url,
        access_key=access.access_key,
        secret_key=access.secret_key,
    )
    try:
        await blobs.ping()
    finally:
        await blobs.aclose()


def _altered(url: str, query: dict[str, str] | None = None, **parts: Any) -> str:
    changed = make_url(url).set(**parts).update_query_dict(query or {})
    return changed.render_as_string(hide_password=False)


async def test_08_each_service_answers_its_own_password(
    services: LocalServices, s3: S3Access
) -> None:
    """What the refusals below are compared with."""
    await _ask_postgres(services.urls.database_url)
    await _ask_redis(services.urls.redis_url)
    await _ask_s3(s3)


@pytest.mark.parametrize("password", ["wrong", ""])
async def test_08_postgres_wants_its_password(services: LocalServices, password: str) -> None:
    """And does not say which part of a login was wrong, nor do we say the password."""
    with pytest.raises(DependencyUnavailable):
        await _ask_postgres(_altered(services.urls.database_url, password=password))
    with pytest.raises(DependencyUnavailable):
        await _ask_postgres(_altered(services.urls.database_url, username="postgres"))


@pytest.mark.parametrize("login", ["", ":wrong@", "default:wrong@"])
async def test_08_redis_wants_its_password(services: LocalServices, login: str) -> None:
    """A connection without one may not even ask whether it lives."""
    address = services.urls.redis_url.rpartition("@")[2]
    with pytest.raises(DependencyUnavailable):
        await _ask_redis(f"redis://{login}{address}")


@pytest.mark.parametrize("changes", [{"secret_key": "wrong"}, {"access_key": "wrong"}])
async def test_08_s3_wants_its_keys(s3: S3Access, changes: dict[str, str]) -> None:
    """Each of the two."""
    with pytest.raises(DependencyUnavailable):
        await _ask_s3(replace(s3, **changes))


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_08_postgres_without_tls_is_refused_where_the_url_asks_for_it(
    services: LocalServices, mode: str
) -> None:
    """There is no falling back to plain text."""
    with pytest.raises(DependencyUnavailable, match=r"SSL|certificate"):
        await _ask_postgres(_altered(services.urls.database_url, {"sslmode": mode}))


async def test_08_redis_without_tls_is_refused_where_the_url_asks_for_it(
    services: LocalServices,
) -> None:
    """rediss:// against a server that speaks redis://."""
    with pytest.raises(DependencyUnavailable):
        await _ask_redis(services.urls.redis_url.replace("redis://", "rediss://", 1))


async def test_08_s3_without_tls_is_refused_where_the_url_asks_for_it(s3: S3Access) -> None:
    """https:// against a server that speaks http://."""
    plain = s3.endpoint_url.replace("http://", "https://", 1)
    with pytest.raises(DependencyUnavailable):
        await _ask_s3(replace(s3, endpoint_url=plain))
