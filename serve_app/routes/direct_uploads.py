"""/api/v1/uploads: a link to send a large photo straight to S3, past this service."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response, status
from pydantic import BaseModel, ConfigDict, Field

from restoration.errors import (
    DependencyUnavailable,
    Forbidden,
    ImageTooLarge,
    InvalidRequest,
    QueueFull,
    RateLimited,
    RestorationError,
    StorageFull,
    Unauthenticated,
)
from restoration.images import ImageType
from serve_app.middleware import Limit
from serve_app.openapi import problems
from serve_app.routes.dependencies import AuthenticatedFirst, ServicesOf, Writer
from serve_app.schemas import UploadView

PATH = "/api/v1/uploads"
BODY_LIMIT = Limit(16 * 1024, InvalidRequest)

router = APIRouter(
    prefix=PATH,
    tags=["uploads"],
    route_class=AuthenticatedFirst,
    responses=problems(
        *(Unauthenticated, Forbidden, DependencyUnavailable, RestorationError),
        malformed_request=422,
    ),
)


class UploadRequest(BaseModel):
    """What will be sent: none of it can be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    content_type: ImageType
    size_bytes: Annotated[int, Field(gt=0)]
    sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    responses=problems(
        *(InvalidRequest, ImageTooLarge, QueueFull, StorageFull, RateLimited), bad_request=400
    ),
)
async def begin_upload(
    caller: Writer, services: ServicesOf, response: Response, asked: UploadRequest
) -> UploadView:
    """Where to PUT a photo, to be named by its `id` in one submission afterwards."""
    await services.jobs.check_room(caller.sub, caller.quotas, asked.size_bytes)
    upload = await services.uploads.begin(
        caller.sub, asked.content_type, asked.size_bytes, asked.sha256
    )
    response.headers["Cache-Control"] = "no-store"
    return UploadView(
        id=upload.id,
        url=upload.link.url,
        headers=upload.link.headers,
        expires_at=upload.link.expires_at,
    )
