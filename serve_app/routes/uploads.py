"""/api/v1/uploads: signed links to send large photos straight to S3, past this service."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response, status
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.json_schema import SkipJsonSchema

from restoration.errors import (
    ImageTooLarge,
    InvalidRequest,
    QueueFull,
    RateLimited,
    StorageFull,
)
from restoration.images import ImageType
from serve_app.asgi.middleware import Limit
from serve_app.asgi.openapi import problems
from serve_app.routes.dependencies import COMMON_PROBLEMS, AuthenticatedFirst, ServicesOf, Writer
from serve_app.schemas.restorations import UploadView

PATH = "/api/v1/uploads"
BODY_LIMIT = Limit(16 * 1024, InvalidRequest)

router = APIRouter(
    prefix=PATH,
    tags=["uploads"],
    route_class=AuthenticatedFirst,
    responses=COMMON_PROBLEMS,
)


# Other names of the accepted types, used by tools and operating systems.
_ALIASES = {
    "image/jpg": ImageType.JPEG,
    "image/pjpeg": ImageType.JPEG,
    "image/jfif": ImageType.JPEG,
    "image/x-png": ImageType.PNG,
    "image/tif": ImageType.TIFF,
    "image/x-tiff": ImageType.TIFF,
    "image/x-tif": ImageType.TIFF,
    "image/x-bmp": ImageType.BMP,
    "image/x-ms-bmp": ImageType.BMP,
    "image/heif": ImageType.HEIC,
    "image/x-webp": ImageType.WEBP,
}


def _media_type(value: object) -> object:
    """Return the registered name of a media type, in lower case and without parameters."""
    if not isinstance(value, str):
        return value
    name = value.partition(";")[0].strip().lower()
    return _ALIASES.get(name, name)


class UploadRequest(BaseModel):
    """The photo that will be sent. None of this can be changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    content_type: Annotated[ImageType, BeforeValidator(_media_type)]
    size_bytes: Annotated[int, Field(gt=0)]
    sha256: (
        Annotated[
            str,
            StringConstraints(pattern="^[0-9a-fA-F]{64}$", strip_whitespace=True, to_lower=True),
        ]
        | SkipJsonSchema[None]
    ) = None


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    responses=problems(
        InvalidRequest, ImageTooLarge, QueueFull, StorageFull, RateLimited, bad_request=400
    ),
)
async def begin_upload(
    caller: Writer, services: ServicesOf, response: Response, asked: UploadRequest
) -> UploadView:
    """Return a signed URL to send a photo to. Use its `id` as `upload_id` of one submission."""
    upload = await services.uploads.begin(
        caller.sub, asked.content_type, asked.size_bytes, asked.sha256, caller.quotas
    )
    response.headers["Cache-Control"] = "no-store"
    return UploadView(
        id=upload.id,
        url=upload.link.url,
        headers=upload.link.headers,
        expires_at=upload.link.expires_at,
    )
