"""The whole HTTP layer on in-memory stores, with real routes, submission and tokens."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import httpx
from PIL import Image

from actors.submission.service import Submission
from actors.submission.uploads import Uploads
from restoration.jobs import Artifact, Failure, Job
from restoration.settings import Settings
from serve_app.app import build_asgi_app
from serve_app.auth.local_issuer import KEY_FILE, LOCAL_AUDIENCE, jwks, mint_token
from serve_app.auth.scopes import USER_SCOPES
from serve_app.auth.tokens import Authenticator, Issuer
from serve_app.services import Services
from serve_app.watch.batches import BatchWatcher
from serve_app.watch.jobs import JobWatcher
from tests.fakes.batches import MemoryBatchStore
from tests.fakes.images import ImagesHere
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.rates import MemoryRateLimiter
from tests.fakes.stores import MemoryBlobStore, MemoryStatusBoard
from tests.fakes.uploads import MemoryUploadStore
from tests.fakes.usage import MemoryUsageLedger
from tests.fakes.workers import MemoryWorkerRegistry
from workflows.catalog import load_catalog

ISSUER = "http://issuer.test"
API = "/api/v1/restorations"


def settings_for_tests(**values: object) -> Settings:
    required = {
        "database_url": "postgresql://u:hunter2@db.internal/d",
        "redis_url": "redis://redis.internal",
        "s3_bucket": "photos",
        "local_issuer_url": ISSUER,
    }
    return Settings.model_validate(required | values)


def photo(size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    """Return the bytes of a picture in one of Pillow's formats."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (40, 90, 160)).save(buffer, format)
    return buffer.getvalue()


def submission(**fields: str) -> dict[str, Any]:
    """Return the httpx arguments to POST a photo with these form fields."""
    return {"files": {"image": ("photo.png", photo(), "image/png")}, "data": fields}


@dataclass
class Site:
    """The services and their stores, which tests can inspect and break."""

    services: Services
    jobs: MemoryJobStore
    batches: MemoryBatchStore
    blobs: MemoryBlobStore
    board: MemoryStatusBoard
    rates: MemoryRateLimiter
    ledger: MemoryUsageLedger
    workers: MemoryWorkerRegistry

    def token(
        self,
        sub: str = "ann",
        scopes: Iterable[str] = USER_SCOPES,
        claims: Mapping[str, object] | None = None,
    ) -> str:
        if claims is None:
            return _token(sub, tuple(scopes))
        return _mint(sub, scopes, claims)

    def client(
        self, sub: str | None = "ann", scopes: Iterable[str] = USER_SCOPES
    ) -> httpx.AsyncClient:
        """Return a client for `sub`, or without a token for None. It sees crashes as 500, like a
        real one."""
        transport = httpx.ASGITransport(build_asgi_app(self.services), raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {self.token(sub, scopes)}"} if sub else {}
        return httpx.AsyncClient(transport=transport, base_url="http://api.test", headers=headers)

    async def submit(self, sub: str = "ann", **fields: str) -> UUID:
        async with self.client(sub) as client:
            answer = await client.post(API, **submission(**fields))
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["id"])

    async def start(self, job_id: UUID) -> Job:
        """Claim the job as a worker would; it must be the next in the queue."""
        job = await self.jobs.claim("worker-1", 60, [w.name for w in self.services.catalog])
        assert job is not None
        assert job.id == job_id
        return job

    async def succeed(self, job: Job, result: bytes = b"restored") -> Artifact:
        content_type = job.output_format.content_type
        output = await self.blobs.put(f"out/{job.id}", result, content_type)
        await self.jobs.succeed(job.ref, output, {"engine": 1.5})
        return output

    async def fail(self, job: Job) -> None:
        await self.jobs.fail(job.ref, Failure("engine_failed", "a node raised"))


# One key for all sites of a run, and one token for each subject: each takes a tenth of a second.
@cache
def _issuer() -> tuple[bytes, dict[str, Any]]:
    with TemporaryDirectory() as folder:
        public = jwks(Path(folder))
        return (Path(folder) / KEY_FILE).read_bytes(), public


@cache
def _token(sub: str, scopes: tuple[str, ...]) -> str:
    return _mint(sub, scopes, {})


def _mint(sub: str, scopes: Iterable[str], claims: Mapping[str, object]) -> str:
    with TemporaryDirectory() as folder:
        (Path(folder) / KEY_FILE).write_bytes(_issuer()[0])
        return mint_token(Path(folder), ISSUER, LOCAL_AUDIENCE, sub, scopes, more_claims=claims)


@asynccontextmanager
async def open_site(**values: object) -> AsyncIterator[Site]:
    """Open a site with these settings."""

    def serve_keys(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=_issuer()[1])

    settings = settings_for_tests(**values)
    catalog = load_catalog(more=settings.workflows_dir)
    jobs = MemoryJobStore(policy=settings.queue_policy)
    blobs, board = MemoryBlobStore(), MemoryStatusBoard()
    batches, rates = MemoryBatchStore(jobs), MemoryRateLimiter()
    ledger = MemoryUsageLedger()
    workers = MemoryWorkerRegistry(jobs)
    async with httpx.AsyncClient(transport=httpx.MockTransport(serve_keys)) as http:
        services = Services(
            settings=settings,
            catalog=catalog,
            submission=Submission(
                *(catalog, jobs, blobs, ImagesHere(settings.upload_limits)),
                *(settings.upload_limits, settings.webhook_rules),
                allowed_nodes=settings.runs_allowed_nodes,
            ),
            jobs=jobs,
            batches=batches,
            blobs=blobs,
            uploads=Uploads(
                MemoryUploadStore(jobs),
                blobs,
                settings.upload_limits,
                settings.upload_url_lifetime_s,
            ),
            status=board,
            authenticator=Authenticator(
                Issuer(ISSUER, LOCAL_AUDIENCE, f"{ISSUER}/.well-known/jwks.json"),
                http,
                settings.quotas,
            ),
            rates=rates,
            usage=ledger,
            workers=workers,
            watcher=JobWatcher(jobs, board, poll_s=0.05),
            batch_watcher=BatchWatcher(batches, poll_s=0.05),
        )
        yield Site(services, jobs, batches, blobs, board, rates, ledger, workers)
