"""Headers, errors and response that all submissions of one picture share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import structlog
from fastapi import Depends, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic.json_schema import SkipJsonSchema

from actors.submission.requests import MAX_NAME_CHARS
from actors.submission.service import Submitted
from restoration.errors import (
    BrokenImage,
    DependencyUnavailable,
    IdempotencyConflict,
    ImageTooLarge,
    InvalidRequest,
    InvalidWebhook,
    QueueFull,
    RateLimited,
    RestorationError,
    ResultExpired,
    ResultNotReady,
    StorageFull,
    TooManyAtOnce,
    TooManyUploads,
    UnsupportedImage,
    UploadNotFound,
    UploadTooSlow,
    UploadUsed,
)
from serve_app.asgi.openapi import PICTURES, Responses, header, problems
from serve_app.auth.scopes import Scope
from serve_app.auth.tokens import Principal
from serve_app.routes.downloads import Download, may_download_now
from serve_app.routes.preferences import preferred_wait_s, prefers
from serve_app.routes.results import picture
from serve_app.routes.views import links_to, show
from serve_app.schemas.restorations import Restoration
from serve_app.services import Services

log = structlog.get_logger(__name__)

IdempotencyKey = Annotated[
    str | SkipJsonSchema[None],
    Header(
        alias="Idempotency-Key",
        max_length=MAX_NAME_CHARS,
        description="Key that makes the request safe to repeat: a repetition returns what the "
        "first request created.",
    ),
]


async def _preferences(
    request: Request,
    _prefer: Annotated[
        str | SkipJsonSchema[None],
        Header(
            alias="Prefer",
            description="`wait=N` waits up to N (at most 60) seconds for the end of the job (RFC "
            "7240). It is ignored if too many requests of the caller are waiting.",
        ),
    ] = None,
) -> Sequence[str]:
    """Return every line of the Prefer header.

    The OpenAPI document shows a single one, since few generators support a list.
    """
    return request.headers.getlist("prefer")


Prefer = Annotated[Sequence[str], Depends(_preferences)]


def submission_responses(*errors: type[RestorationError]) -> Responses:
    """Return the OpenAPI responses of a submission, with `errors` added to the common ones."""
    return {
        202: {
            "description": "Accepted. The photo is stored, and the job will end.",
            "headers": {
                "Location": header("Path of the job."),
                "Preference-Applied": header("`wait=N` if the response waited for the job."),
            },
        },
        200: {
            "description": "The ended job (with `Prefer: wait`, or with `reuse=allow` and a stored "
            "result), or the job of an earlier request with the same Idempotency-Key or "
            "upload. If the job succeeded and Accept prefers an image to JSON, its result.",
            "model": Restoration,
            "content": PICTURES,
            "headers": {
                "Location": header("Path of the job."),
                "Idempotent-Replayed": header("`true` if the job is that of an earlier request."),
                "Preference-Applied": header("`wait=N` if the response waited for the job."),
            },
        },
        **problems(
            InvalidRequest,
            IdempotencyConflict,
            UploadNotFound,
            UploadUsed,
            ResultNotReady,
            ResultExpired,
            ImageTooLarge,
            UnsupportedImage,
            BrokenImage,
            InvalidWebhook,
            QueueFull,
            StorageFull,
            RateLimited,
            TooManyUploads,
            TooManyAtOnce,
            UploadTooSlow,
            *errors,
            bad_request=400,
            unsupported_media_type=415,
            malformed_request=422,
        ),
    }


async def answer(
    request: Request,
    caller: Principal,
    services: Services,
    submitted: Submitted,
    prefer: Sequence[str],
) -> Response:
    """Return the response to a submission: the job, or its result if the client accepts a picture.

    With `Prefer: wait` it waits for the end of the job first. Raises ResultNotReady if the job
    ended without the result that was asked for.
    """
    job, wait_s = submitted.job, preferred_wait_s(prefer)
    if wait_s is not None:
        try:
            with request.app.state.waits.take_now(caller.sub):
                job = await services.watcher.wait(job, wait_s)
        except TooManyAtOnce as error:  # a server may ignore a preference
            log.info("answer_not_waited_for", job_id=str(job.id), reason=error.message)
            wait_s = None
    headers = {"Location": links_to(request, job.id).self_}
    if submitted.replayed:
        headers["Idempotent-Replayed"] = "true"
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s}"
    wants_picture = prefers(
        job.output_format.content_type, "application/json", request.headers.getlist("accept")
    )
    may_have_it = Scope.READ in caller.scopes and may_download_now(request, caller.sub)
    if job.status.is_final and wants_picture and may_have_it:
        try:
            return Download(await picture(request, services.blobs, job, headers), caller.sub)
        except DependencyUnavailable as error:  # the job exists all the same
            log.warning("picture_not_sent", job_id=str(job.id), reason=error.message)
    view = await show(request, services.status, job)
    is_done = submitted.replayed or job.status.is_final
    body = view.model_dump(mode="json", by_alias=True)
    return JSONResponse(body, 200 if is_done else 202, headers)
