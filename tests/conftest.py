"""Fixtures that the suites share: one set of services, one engine installation, one stack a
session.

All of them are real, from the same wheels that `make demo` uses. Their folders lie outside pytest's
own, which root keeps closed to the account that Postgres runs under.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
from blockbuster import blockbuster_ctx
from hypothesis import HealthCheck, settings
from sqlalchemy import make_url

from actors.observability.logging import configure_logging
from comfy_pool.install.engine import EngineInstall, install_engine
from comfy_pool.install.models import install_models
from persistence.embedded.local import LocalServices
from persistence.objects.s3 import S3BlobStore
from persistence.postgres.database import Database
from persistence.postgres.migrate import upgrade
from restoration.settings import NodeSettings
from tests.fakes.collector import Collector, collecting
from tests.support.stack import LEASE_S, Stack, running_stack
from workflows.catalog import load_catalog

# An example may take any time on a busy machine.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

pytest_plugins = ["tests.support.hanging"]

PRODUCT = ["restoration", "workflows", "comfy_pool", "persistence", "actors", "serve_app"]
# libraries guard their state with mutexes (queues, models, loggers), held for microseconds
MUTEXES = ("threading.Lock.acquire", "threading.Lock.acquire_lock")
MAY_BLOCK = {
    # A replica reads its workflows while it starts, before it serves a request.
    "workflows/catalog.py": {"load_catalog"},
    # A worker finds its install, and clears its pixel folder, before its first job and after its
    # last.
    "comfy_pool/factory.py": {"engine_on_this_node"},
    # Migrations run before anything serves; an async fixture may be the first to ask for them.
    "persistence/postgres/migrate.py": {"upgrade"},
    # It starts and stops servers and a Ray on the tests' own event loop.
    "tests/support/fleet.py": {"running_fleet", "_surroundings"},
    # The command line and the issuer's thread read the key; only tests do so on an event loop.
    "serve_app/auth/local_issuer.py": {"ensure_key"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need servers, and run the tests of the stack last, since it keeps a core
    busy."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "services" in fixtures or "stack" in fixtures:
            item.add_marker(pytest.mark.services)
    items.sort(key=lambda item: "stack" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> None:
    configure_logging("console")


@pytest.fixture(scope="session", autouse=True)
def _blocking_calls_fail() -> Iterator[None]:
    """Make a blocking call of the product on an event loop raise BlockingError."""
    with blockbuster_ctx(PRODUCT) as blockbuster:
        for name in MUTEXES:
            blockbuster.functions[name].deactivate()
        for call in blockbuster.functions.values():
            for file, functions in MAY_BLOCK.items():
                call.can_block_in(file, functions)
        yield


@dataclass(frozen=True)
class S3Access:
    endpoint_url: str
    access_key: str
    secret_key: str
    bucket: str


@pytest.fixture(scope="session")
def engine_install() -> EngineInstall:
    """Return the ComfyUI and the models in the user cache, installed if they are missing."""
    cache_dir = NodeSettings().cache_dir
    install = install_engine(cache_dir)
    install_models(cache_dir, load_catalog().models())
    return install


@pytest.fixture(scope="session")
def services() -> Iterator[LocalServices]:
    """Start Postgres, Valkey and SeaweedFS for all tests that need not break them."""
    with tempfile.TemporaryDirectory(prefix="comfy-restore-", ignore_cleanup_errors=True) as folder:
        with LocalServices(Path(folder)) as services:
            yield services


@pytest.fixture(scope="session")
def migrated_url(services: LocalServices) -> str:
    upgrade(services.urls.database_url)
    return services.urls.database_url


@pytest.fixture
def database_url(migrated_url: str) -> str:
    """Return the URL of a migrated database without rows."""
    url = make_url(migrated_url).set(drivername="postgresql")
    with closing(psycopg2.connect(url.render_as_string(hide_password=False))) as connection:
        with connection, connection.cursor() as cursor:
            cursor.execute("TRUNCATE jobs, turns, owners, uploads, batches, workers CASCADE")
    return migrated_url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    # A busy machine takes longer than a client would wait.
    database = Database(database_url, queue_timeout_s=300)
    yield database
    await database.aclose()


@pytest.fixture(scope="session")
def redis_url(services: LocalServices) -> str:
    return services.urls.redis_url


@pytest.fixture(scope="session")
def s3(services: LocalServices) -> S3Access:
    urls = services.urls
    return S3Access(urls.s3_endpoint_url, urls.s3_access_key, urls.s3_secret_key, urls.s3_bucket)


@pytest.fixture
async def blobs(s3: S3Access) -> AsyncIterator[S3BlobStore]:
    store = S3BlobStore(
        s3.bucket,
        endpoint_url=s3.endpoint_url,
        access_key=s3.access_key,
        secret_key=s3.secret_key,
    )
    yield store
    await store.aclose()


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Receive the traces of the stack."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def stack(engine_install: EngineInstall, collector: Collector) -> Iterator[Stack]:
    """Start a complete real stack with two workers, each with a ComfyUI."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "LEASE_S": str(LEASE_S)}
    with running_stack(workers=2, environ=environ) as stack:
        yield stack
