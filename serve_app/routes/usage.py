"""/api/v1/usage: the usage of jobs, in seconds of execution by an engine."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from serve_app.routes.dependencies import COMMON_PROBLEMS, Reader, ServicesOf
from serve_app.schemas.restorations import UsageReport, UsageView

DEFAULT_DAYS = 30

router = APIRouter(prefix="/api/v1/usage", tags=["usage"], responses=COMMON_PROBLEMS)


@router.get("")
async def get_usage(
    caller: Reader,
    services: ServicesOf,
    since: Annotated[
        datetime | None,
        Query(description="attempts that began to execute then or later; UTC without an offset"),
    ] = None,
) -> UsageReport:
    """Sum the caller's usage, or all owners' for `admin`, by default over the last 30 days."""
    since = since or datetime.now(UTC) - timedelta(days=DEFAULT_DAYS)
    since = since if since.tzinfo else since.replace(tzinfo=UTC)
    sums = await services.usage.since(since, caller.reach)
    return UsageReport(since=since, usage=tuple(map(UsageView.model_validate, sums)))
