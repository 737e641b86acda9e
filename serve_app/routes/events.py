"""/api/v1/restorations/{job_id}/events: the events of a job as Server-Sent Events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from restoration.errors import (
    InvalidRequest,
    JobNotFound,
    TooManyAtOnce,
)
from serve_app import sse
from serve_app.asgi.openapi import problems
from serve_app.routes.dependencies import COMMON_PROBLEMS, Reader, ServicesOf
from serve_app.watch.job_feed import Seen

HEARTBEAT_S = 15.0

router = APIRouter(prefix="/api/v1/restorations", tags=["restorations"], responses=COMMON_PROBLEMS)


class EventStream(StreamingResponse):
    """A response of Server-Sent Events; its generator is closed when the client disconnects.

    The stream takes one of the owner's places for open streams.
    """

    media_type = sse.MEDIA_TYPE

    def __init__(self, events: AsyncGenerator[bytes, None], owner: str) -> None:
        # X-Accel-Buffering: without it nginx, and servers like it, would hold events back
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events
        self._owner = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with scope["app"].state.streams.one_more(self._owner):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


@router.get(
    "/{job_id}/events",
    status_code=200,
    response_class=EventStream,
    responses={
        200: {
            "description": "`state`, `progress` and `preview` events. The first is the state as "
            "it is now, the last a final state, after which the stream ends. Progress may be "
            "skipped, the end never is.",
            "content": {sse.MEDIA_TYPE: {"schema": sse.EVENT_SCHEMA}},
        },
        **problems(InvalidRequest, JobNotFound, TooManyAtOnce),
    },
)
async def follow_restoration(
    job_id: UUID,
    caller: Reader,
    services: ServicesOf,
    last_event_id: Annotated[
        str | None,
        Header(alias="Last-Event-ID", description="resumes after this event", max_length=64),
    ] = None,
) -> EventStream:
    """Follow a job until it has ended."""
    job = await services.jobs.get(job_id, caller.reach)
    events = _encoded(services.watcher.watch(job, last_event_id))
    return EventStream(kept_alive(events), caller.sub)


async def _encoded(watch: AsyncGenerator[Seen | None, None]) -> AsyncGenerator[bytes | None, None]:
    async with aclosing(watch):
        async for seen in watch:
            yield seen.encoded if seen else None


async def kept_alive(
    events: AsyncGenerator[bytes | None, None],
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded events, and a comment after HEARTBEAT_S without any."""
    now = asyncio.get_running_loop().time
    sent_at = now()
    async with aclosing(events):
        async for event in events:
            if event is not None:
                yield event
            elif now() - sent_at >= HEARTBEAT_S:
                yield sse.encode_comment("alive")
            else:
                continue
            sent_at = now()
