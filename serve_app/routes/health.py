"""/healthz and /readyz, for load balancers: they need no token and reveal no secrets."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request, Response, status

from serve_app.readiness import ReadinessProbe
from serve_app.schemas.restorations import Health, Readiness

# Redis is not required: without it jobs run, but show no progress, and no request is rate limited.
REQUIRED = frozenset({"postgres", "s3", "issuer"})

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def get_health() -> Health:
    """Report that the process and its event loop are alive."""
    return Health(status="ok")


@router.get(
    "/readyz",
    responses={503: {"model": Readiness, "description": "A required dependency is down."}},
)
async def get_readiness(request: Request, response: Response) -> Readiness:
    """Report the state of each dependency, at most a second old.

    Without Redis the service is `degraded`, but still serves.
    """
    found = await cast("ReadinessProbe", request.app.state.readiness).results()
    down = {name for name, verdict in found.items() if verdict == "error"}
    if down & REQUIRED:
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
        return Readiness(status="unavailable", dependencies=found)
    return Readiness(status="degraded" if down else "ok", dependencies=found)
