"""The services behind the HTTP layer: one frozen value, made by the composition root or a test.

`resources` holds everything that was opened for it, and `aclose` closes that.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import httpx

from actors.images.process_pool import ImageProcessPool
from actors.submission.batches import BatchSubmission
from actors.submission.service import Submission
from actors.submission.uploads import Uploads
from persistence.objects.redis_cache import open_blobs
from persistence.postgres.batches import PostgresBatchStore
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.uploads import PostgresUploadStore
from persistence.postgres.usage import PostgresUsageLedger
from persistence.postgres.workers import PostgresWorkerRegistry
from persistence.redis.rate_limits import RedisRateLimiter
from persistence.redis.status import RedisStatusBoard
from restoration.limits.rates import RateLimiter
from restoration.observability.metrics import Meter, NullMeter
from restoration.observability.usage import UsageLedger
from restoration.ports.batches import BatchStore
from restoration.ports.jobs import JobAccess
from restoration.ports.objects import BlobStore
from restoration.ports.progress import StatusBoard
from restoration.ports.workers import WorkerRegistry
from restoration.settings import Settings
from serve_app.auth.tokens import Authenticator, issuer_from
from serve_app.watch.batches import BatchWatcher
from serve_app.watch.jobs import JobWatcher
from workflows.catalog import Catalog, load_catalog


@dataclass(frozen=True, slots=True)
class Services:
    """The stores, clients and settings that the routes use. `aclose` closes `resources`."""

    settings: Settings
    catalog: Catalog
    submission: Submission
    jobs: JobAccess
    batches: BatchStore
    blobs: BlobStore
    uploads: Uploads
    status: StatusBoard
    authenticator: Authenticator
    rates: RateLimiter
    usage: UsageLedger
    workers: WorkerRegistry
    watcher: JobWatcher
    batch_watcher: BatchWatcher
    meter: Meter = field(default_factory=NullMeter)
    resources: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def batch_submission(self) -> BatchSubmission:
        return BatchSubmission(self.submission, self.batches)

    async def aclose(self) -> None:
        await self.resources.aclose()


def open_services(settings: Settings, meter: Meter | None = None) -> Services:
    """Return the real services. Nothing connects before its first use.

    Raises InvalidSettings and WorkflowInvalid.
    """
    issuer, catalog = issuer_from(settings), load_catalog(more=settings.workflows_dir)
    resources = AsyncExitStack()
    database = Database(settings.database_url.get_secret_value())
    resources.push_async_callback(database.aclose)
    jobs = PostgresJobStore(database, settings.queue_policy)
    blobs = open_blobs(settings, resources)
    images = ImageProcessPool(
        settings.upload_limits, settings.image_processes, settings.image_cpu_s
    )
    resources.push_async_callback(images.aclose)
    board = RedisStatusBoard(settings.redis_url.get_secret_value())
    resources.push_async_callback(board.aclose)
    rates = RedisRateLimiter(settings.redis_url.get_secret_value())
    resources.push_async_callback(rates.aclose)
    # the local issuer must not be reached through a proxy named by the environment
    http = httpx.AsyncClient(trust_env=settings.auth0_domain is not None)
    resources.push_async_callback(http.aclose)
    batches = PostgresBatchStore(database, settings.queue_policy)
    return Services(
        settings=settings,
        catalog=catalog,
        submission=Submission(
            catalog,
            jobs,
            blobs,
            images,
            settings.upload_limits,
            settings.webhook_rules,
            settings.runs_allowed_nodes,
        ),
        jobs=jobs,
        batches=batches,
        blobs=blobs,
        uploads=Uploads(
            PostgresUploadStore(database, settings.queue_policy),
            blobs,
            settings.upload_limits,
            settings.upload_url_lifetime_s,
        ),
        status=board,
        authenticator=Authenticator(issuer, http, settings.quotas),
        rates=rates,
        usage=PostgresUsageLedger(database),
        meter=meter or NullMeter(),
        workers=PostgresWorkerRegistry(database),
        watcher=JobWatcher(jobs, board),
        batch_watcher=BatchWatcher(batches),
        resources=resources,
    )
