"""/healthz and /readyz, for load balancers: no token, no secrets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Literal

import structlog
from fastapi import APIRouter, Response, status

from restoration.errors import RestorationError
from serve_app.routes.dependencies import ServicesOf
from serve_app.schemas import Health, Readiness

log = structlog.get_logger(__name__)

PING_TIMEOUT_S = 2.0
# Redis is not among them: without it jobs lose their progress bars, and run.
REQUIRED = frozenset({"postgres", "s3", "issuer"})

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def get_health() -> Health:
    """The process lives and its event loop turns."""
    return Health(status="ok")


@router.get(
    "/readyz",
    responses={503: {"model": Readiness, "description": "a required dependency is down"}},
)
async def get_readiness(response: Response, services: ServicesOf) -> Readiness:
    """Each dependency by name. Without Redis the service is degraded, and serves."""
    pings = {
        "postgres": services.jobs.ping(),
        "s3": services.blobs.ping(),
        "redis": services.status.ping(),
        "issuer": services.authenticator.ping(),
    }
    results = await asyncio.gather(*(_ping(name, ping) for name, ping in pings.items()))
    found = dict(zip(pings, results, strict=True))
    down = {name for name, result in found.items() if result == "error"}
    if down & REQUIRED:
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
        return Readiness(status="unavailable", dependencies=found)
    return Readiness(status="degraded" if down else "ok", dependencies=found)


async def _ping(name: str, ping: Awaitable[None]) -> Literal["ok", "error"]:
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await ping
    except (RestorationError, TimeoutError) as error:
        log.warning("dependency_down", dependency=name, reason=repr(error))
        return "error"
    return "ok"
