"""/api/v1/batches: many photos in one request. Another owner's batch is 404."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response, status
from fastapi.responses import JSONResponse

from restoration.batches import MAX_BATCH_ITEMS, JobBatch
from restoration.errors import (
    BatchExpired,
    BatchNotFound,
    BatchTooLarge,
    IdempotencyConflict,
    InvalidParameters,
    InvalidRequest,
    QueueFull,
    RateLimited,
    StorageFull,
    TooManyAtOnce,
    TooManyUploads,
    UnknownWorkflow,
    UploadTooSlow,
)
from serve_app import sse
from serve_app.asgi.openapi import header, problems
from serve_app.forms.batch_form import BATCH_BODY, BatchFormReader
from serve_app.forms.upload_bytes import BatchShare
from serve_app.forms.upload_slots import UploadSlot
from serve_app.routes.dependencies import (
    COMMON_PROBLEMS,
    ListedOwner,
    Reader,
    ServicesOf,
    Writer,
    next_page,
)
from serve_app.routes.events import EventStream
from serve_app.routes.submissions import IdempotencyKey
from serve_app.schemas.batches import (
    BatchItems,
    BatchLinks,
    BatchList,
    BatchProgress,
    BatchView,
    SubmittedBatchView,
    batch_item_view,
    batch_view,
)

PATH = "/api/v1/batches"
MAX_PAGE = 100

router = APIRouter(prefix=PATH, tags=["batches"], responses=COMMON_PROBLEMS)


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=SubmittedBatchView,
    responses={
        202: {
            "description": "Accepted. Each photo with a `job_id` is stored, and its job will end. "
            "Each other photo has a `failure` with the reason.",
            "headers": {"Location": header("Path of the batch.")},
        },
        200: {
            "description": "The batch of an earlier request with the same Idempotency-Key.",
            "model": SubmittedBatchView,
            "headers": {
                "Location": header("Path of the batch."),
                "Idempotent-Replayed": header("`true`"),
            },
        },
        **problems(
            InvalidRequest,
            UnknownWorkflow,
            IdempotencyConflict,
            BatchExpired,
            BatchTooLarge,
            InvalidParameters,
            QueueFull,
            StorageFull,
            RateLimited,
            TooManyUploads,
            UploadTooSlow,
            bad_request=400,
            unsupported_media_type=415,
            malformed_request=422,
        ),
    },
    openapi_extra={"requestBody": BATCH_BODY},
)
async def submit_batch(
    request: Request,
    caller: Writer,
    services: ServicesOf,
    _slot: UploadSlot,
    _share: BatchShare,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit up to 1,000 photos to be restored with the same options."""
    form = BatchFormReader(request, services.settings.upload_max_bytes)
    first = (await form.fields()).to_request(caller, b"", idempotency_key)
    if form.names_workflow:  # errors in the fields so far cannot be undone by later fields
        services.submission.check(first)
    async with aclosing(form.photos()) as photos:
        submitted = await services.batch_submission.submit(
            first, photos, lambda: form.all_fields().to_request(caller, b"", idempotency_key)
        )
    items = tuple(map(batch_item_view, submitted.items))
    view = SubmittedBatchView(**dict(_show(request, submitted.batch)), items=items)
    headers = {"Location": view.links.self_}
    if submitted.replayed:
        headers["Idempotent-Replayed"] = "true"
    body = view.model_dump(mode="json", by_alias=True)
    return JSONResponse(body, 200 if submitted.replayed else 202, headers)


@router.get("", responses=problems(InvalidRequest))
async def list_batches(
    request: Request,
    caller: Reader,
    owner: ListedOwner,
    services: ServicesOf,
    cursor: Annotated[
        str | None,
        Query(description="Opaque position in the list. Follow `next` instead of building it."),
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=MAX_PAGE, description="Maximum number of items in a page.")
    ] = 20,
) -> BatchList:
    """List an owner's batches, by default the caller's, newest first."""
    page = await services.batches.list(owner, cursor, limit)
    following = next_page(request, caller, owner, page.next_cursor, limit=limit)
    return BatchList(batches=tuple(_show(request, batch) for batch in page.batches), next=following)


@router.get("/{batch_id}", responses=problems(BatchNotFound))
async def get_batch(
    request: Request, batch_id: UUID, caller: Reader, services: ServicesOf
) -> BatchView:
    """Return a batch as it is now."""
    return _show(request, await services.batches.get(batch_id, caller.reach))


@router.get("/{batch_id}/items", responses=problems(BatchNotFound))
async def list_batch_items(
    request: Request,
    batch_id: UUID,
    caller: Reader,
    services: ServicesOf,
    first: Annotated[
        int, Query(ge=0, le=MAX_BATCH_ITEMS, description="Index of the first photo to list.")
    ] = 0,
    limit: Annotated[
        int, Query(ge=1, le=MAX_BATCH_ITEMS, description="Maximum number of items in a page.")
    ] = 100,
) -> BatchItems:
    """List a batch's photos in the order of submission, each with its job or its failure."""
    # One more item than asked for shows whether there is another page.
    found = await services.batches.items(batch_id, caller.reach, first, limit + 1)
    following: str | None = None
    if len(found) > limit:
        query = {"first": first + limit, "limit": limit}
        following = f"{request.url.path}?{urlencode(query)}"
    return BatchItems(items=tuple(map(batch_item_view, found[:limit])), next=following)


@router.post(
    "/{batch_id}/cancel",
    status_code=status.HTTP_202_ACCEPTED,
    responses={
        202: {
            "description": "Cancellation was requested. Running jobs stop at their engine's next "
            "node or step."
        },
        200: {"description": "All jobs have ended, cancelled or not.", "model": BatchView},
        **problems(BatchNotFound, RateLimited),
    },
)
async def cancel_batch(
    request: Request, response: Response, batch_id: UUID, caller: Writer, services: ServicesOf
) -> BatchView:
    """Cancel every job of the batch that has not ended. Repeating it changes nothing."""
    batch = await services.batches.request_cancel(batch_id, caller.reach)
    if batch.status.is_final:
        response.status_code = status.HTTP_200_OK
    return _show(request, batch)


@router.get(
    "/{batch_id}/events",
    status_code=200,
    response_class=EventStream,
    responses={
        200: {
            "description": "`progress` events with `status` and `counts`: the current ones first, "
            "then each change, at most two a second. The last event has a final status; then the "
            "stream ends.",
            "content": {sse.MEDIA_TYPE: {"schema": sse.EVENT_SCHEMA}},
        },
        **problems(BatchNotFound, TooManyAtOnce),
    },
)
async def follow_batch(batch_id: UUID, caller: Reader, services: ServicesOf) -> EventStream:
    """Follow a batch until it has ended."""
    batch = await services.batches.get(batch_id, caller.reach)

    def encode(batch: JobBatch) -> bytes:
        data = BatchProgress.model_validate(batch).model_dump_json()
        return sse.encode(sse.ServerEvent("progress", data))

    return EventStream(services.batch_watcher.watch(batch), encode, caller.sub)


def _show(request: Request, batch: JobBatch) -> BatchView:
    def path(route: str) -> str:
        return request.url_for(route, batch_id=str(batch.id)).path

    links = BatchLinks(
        self_=path("get_batch"),
        items=path("list_batch_items"),
        events=path("follow_batch"),
        cancel=path("cancel_batch"),
    )
    return batch_view(batch, links)
