"""Jobs as the API shows them, with links and live progress."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from uuid import UUID

import structlog
from fastapi import Request

from restoration.errors import DependencyUnavailable
from restoration.events import JobEvent
from restoration.jobs import Job, JobStatus
from restoration.ports.progress import StatusBoard
from serve_app.routes.dependencies import services_of
from serve_app.schemas import restorations

log = structlog.get_logger(__name__)

PROGRESS_TIMEOUT_S = 1.0
_HAS_PROGRESS = frozenset({JobStatus.RUNNING, JobStatus.CANCELLING})


async def show(request: Request, board: StatusBoard, job: Job) -> restorations.Restoration:
    """Return one job's view; see `show_all`."""
    return (await show_all(request, board, [job]))[0]


async def show_all(
    request: Request, board: StatusBoard, jobs: Sequence[Job]
) -> list[restorations.Restoration]:
    """Return the jobs' views: progress from the board, webhook deliveries from the store."""
    running = [job.id for job in jobs if job.status in _HAS_PROGRESS]
    events: Mapping[UUID, Sequence[JobEvent]] = {}
    if running:
        try:
            async with asyncio.timeout(PROGRESS_TIMEOUT_S):
                events = await board.latest(running)
        except (DependencyUnavailable, TimeoutError) as error:
            log.warning("progress_unavailable", reason=repr(error))
    ended = [job.id for job in jobs if job.options.webhook_url and job.status.is_final]
    deliveries = await services_of(request).jobs.deliveries(ended) if ended else {}
    return [
        restorations.restoration(
            job,
            links_to(request, job.id),
            restorations.progress_view(job, events.get(job.id, ())),
            restorations.webhook_view(job, deliveries.get(job.id)),
        )
        for job in jobs
    ]


def links_to(request: Request, job_id: UUID) -> restorations.Links:
    """Return the paths of a job's resources."""

    def path(route: str) -> str:
        return request.url_for(route, job_id=str(job_id)).path

    return restorations.Links(
        self_=path("get_restoration"),
        events=path("follow_restoration"),
        cancel=path("cancel_restoration"),
        retry=path("retry_restoration"),
        result=path("get_result"),
    )
