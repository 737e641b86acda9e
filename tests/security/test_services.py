"""Postgres, Redis and S3 require their passwords, and TLS where their URL asks for it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import make_url, text

from persistence.embedded.local import LocalServices
from persistence.objects.s3 import S3BlobStore
from persistence.postgres.database import Database
from persistence.redis.status import RedisStatusBoard
from restoration.errors import DependencyUnavailable
from tests.conftest import S3Access
from tests.fakes.authority import Authority, relaying


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


@pytest.mark.secrets
async def test_each_service_answers_its_own_password(services: LocalServices, s3: S3Access) -> None:
    """The right passwords work, which gives the refusals below their meaning."""
    await _ask_postgres(services.urls.database_url)
    await _ask_redis(services.urls.redis_url)
    await _ask_s3(s3)


@pytest.mark.secrets
@pytest.mark.parametrize("password", ["wrong", ""])
async def test_postgres_wants_its_password(services: LocalServices, password: str) -> None:
    """A wrong password or user raises DependencyUnavailable."""
    with pytest.raises(DependencyUnavailable):
        await _ask_postgres(_altered(services.urls.database_url, password=password))
    with pytest.raises(DependencyUnavailable):
        await _ask_postgres(_altered(services.urls.database_url, username="postgres"))


@pytest.mark.secrets
@pytest.mark.parametrize("login", ["", ":wrong@", "default:wrong@"])
async def test_redis_wants_its_password(services: LocalServices, login: str) -> None:
    """Without a password even a ping is refused."""
    address = services.urls.redis_url.rpartition("@")[2]
    with pytest.raises(DependencyUnavailable):
        await _ask_redis(f"redis://{login}{address}")


@pytest.mark.secrets
@pytest.mark.parametrize("changes", [{"secret_key": "wrong"}, {"access_key": "wrong"}])
async def test_s3_wants_its_keys(s3: S3Access, changes: dict[str, str]) -> None:
    """Either key being wrong is refused."""
    with pytest.raises(DependencyUnavailable):
        await _ask_s3(replace(s3, **changes))


@pytest.mark.secrets
@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_postgres_without_tls_is_refused_where_the_url_asks_for_it(
    services: LocalServices, mode: str
) -> None:
    """There is no fallback to plain text."""
    with pytest.raises(DependencyUnavailable, match=r"SSL|certificate"):
        await _ask_postgres(_altered(services.urls.database_url, {"sslmode": mode}))


@pytest.mark.secrets
async def test_redis_without_tls_is_refused_where_the_url_asks_for_it(
    services: LocalServices,
) -> None:
    """A rediss:// URL fails on a server without TLS."""
    with pytest.raises(DependencyUnavailable):
        await _ask_redis(services.urls.redis_url.replace("redis://", "rediss://", 1))


@pytest.mark.secrets
async def test_s3_without_tls_is_refused_where_the_url_asks_for_it(s3: S3Access) -> None:
    """An https:// URL fails on a server without TLS."""
    plain = s3.endpoint_url.replace("http://", "https://", 1)
    with pytest.raises(DependencyUnavailable):
        await _ask_s3(replace(s3, endpoint_url=plain))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("tls"))


async def _ask_for_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer Postgres' SSLRequest with consent, as its protocol demands."""
    await reader.readexactly(8)
    writer.write(b"S")
    await writer.drain()


@pytest.mark.secrets
@pytest.mark.parametrize(
    ("certified", "mode", "accepted"),
    [
        ("localhost", "verify-full", True),
        ("other.example.com", "verify-full", False),
        ("other.example.com", "verify-ca", True),
    ],
)
async def test_postgres_must_be_who_its_url_says(
    services: LocalServices, authority: Authority, certified: str, mode: str, accepted: bool
) -> None:
    """verify-full checks the host name in the certificate; our part is to pass it on to libpq."""
    url = make_url(services.urls.database_url)
    assert url.port is not None
    tls = {"sslmode": mode, "sslrootcert": str(authority.path)}
    async with relaying(url.port, authority.server(certified), _ask_for_tls) as port:
        behind_tls = _altered(services.urls.database_url, tls, host="localhost", port=port)
        with nullcontext() if accepted else pytest.raises(DependencyUnavailable):
            await _ask_postgres(behind_tls)


@pytest.mark.secrets
@pytest.mark.parametrize(
    ("certified", "accepted"), [("localhost", True), ("other.example.com", False)]
)
async def test_redis_must_be_who_its_url_says(
    services: LocalServices, authority: Authority, certified: str, accepted: bool
) -> None:
    """rediss:// checks the certificate and its name by default."""
    url = make_url(services.urls.redis_url)
    assert url.port is not None
    async with relaying(url.port, authority.server(certified)) as port:
        behind_tls = _altered(
            services.urls.redis_url,
            {"ssl_ca_certs": str(authority.path)},
            drivername="rediss",
            host="localhost",
            port=port,
        )
        with nullcontext() if accepted else pytest.raises(DependencyUnavailable):
            await _ask_redis(behind_tls)
