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
        Query(
            description="Count attempts that started to execute at this time or later. Without an "
            "offset, the time is in UTC."
        ),
    ] = None,
) -> UsageReport:
    """Sum the usage since a time: the caller's, or all owners' with `admin`. Default: 30 days."""
    since = since or datetime.now(UTC) - timedelta(days=DEFAULT_DAYS)
    since = since if since.tzinfo else since.replace(tzinfo=UTC)
    sums = await services.usage.since(since, caller.reach)
    return UsageReport(since=since, usage=tuple(map(UsageView.model_validate, sums)))
