"""/api/v1/restorations/{job_id}/events: the events of a job as Server-Sent Events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, TypeVar
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
            "description": "`state`, `progress` and `preview` events. The first is the current "
            "state. The last is a final state; then the stream ends. Progress events may be "
            "skipped, the final state never is.",
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
        Header(
            alias="Last-Event-ID",
            description="Id of the last event received. The stream resumes after it.",
            max_length=64,
        ),
    ] = None,
) -> EventStream:
    """Follow a job until it has ended."""
    job = await services.jobs.get(job_id, caller.reach)
    watch = services.watcher.watch(job, last_event_id)
    return EventStream(kept_alive(watch, lambda seen: seen.encoded), caller.sub)


_T = TypeVar("_T")


async def kept_alive(
    watch: AsyncGenerator[_T | None, None], encode: Callable[[_T], bytes]
) -> AsyncGenerator[bytes, None]:
    """Yield what `watch` yields, encoded, and a comment after HEARTBEAT_S without any of it.

    `watch` yields None from time to time while there is nothing new.
    """
    now = asyncio.get_running_loop().time
    sent_at = now()
    async with aclosing(watch):
        async for seen in watch:
            if seen is not None:
                yield encode(seen)
            elif now() - sent_at >= HEARTBEAT_S:
                yield sse.encode_comment("alive")
            else:
                continue
            sent_at = now()
