"""/api/v1/restorations/{job_id}/events: the events of a job as Server-Sent Events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from operator import attrgetter
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import APIRouter, Header
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from persistence.redis.stream_codec import parse_id
from restoration.errors import InvalidRequest, JobNotFound, TooManyAtOnce
from restoration.limits.fair_places import FairPlaces
from restoration.observability.metrics import SSE_CLIENTS, Meter
from serve_app import sse
from serve_app.asgi.openapi import problems
from serve_app.routes.dependencies import COMMON_PROBLEMS, Reader, ServicesOf

HEARTBEAT_S = 15.0

E = TypeVar("E")

router = APIRouter(prefix="/api/v1/restorations", tags=["restorations"], responses=COMMON_PROBLEMS)


class EventStream(StreamingResponse):
    """A response of Server-Sent Events, in one of the owner's places for open streams.

    `watch` yields events, and None now and then without one. It is closed when the client
    disconnects. After HEARTBEAT_S without an event, a comment is sent.
    """

    media_type = sse.MEDIA_TYPE

    def __init__(
        self, watch: AsyncGenerator[E | None, None], encode: Callable[[E], bytes], owner: str
    ) -> None:
        async def encoded() -> AsyncGenerator[bytes, None]:
            sent_at = time.monotonic()
            async with aclosing(watch):
                async for event in watch:
                    if event is not None:
                        yield encode(event)
                    elif time.monotonic() - sent_at >= HEARTBEAT_S:
                        yield sse.encode_comment("alive")
                    else:
                        continue
                    sent_at = time.monotonic()

        self._events = encoded()
        self._owner = owner
        # X-Accel-Buffering: without it nginx, and servers like it, would hold events back
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._events, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        places: FairPlaces = scope["app"].state.streams
        meter: Meter = scope["app"].state.services.meter
        place = places.take_now(self._owner)
        try:
            meter.gauge(SSE_CLIENTS, places.taken)
            await super().__call__(scope, receive, send)
        finally:
            place.give_back()
            meter.gauge(SSE_CLIENTS, places.taken)

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
    after = None if last_event_id is None else parse_id(last_event_id)
    return EventStream(services.watcher.watch(job, after), attrgetter("encoded"), caller.sub)
