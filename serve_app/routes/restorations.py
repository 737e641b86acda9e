"""/api/v1/restorations: submit, list, look, cancel, fetch. Somebody else's job is 404."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response, status
from fastapi.responses import JSONResponse, RedirectResponse

from actors.submission import MAX_NAME_CHARS
from restoration.errors import (
    BrokenImage,
    DependencyUnavailable,
    Forbidden,
    IdempotencyConflict,
    IllegalTransition,
    ImageTooLarge,
    InputExpired,
    InvalidParameters,
    InvalidRequest,
    InvalidWebhook,
    JobNotFound,
    QueueFull,
    RateLimited,
    RestorationError,
    ResultExpired,
    ResultNotReady,
    StorageFull,
    TooManyUploads,
    Unauthenticated,
    UnknownWorkflow,
    UnsupportedImage,
)
from restoration.jobs import JobStatus, OutputFormat
from serve_app.openapi import header, problems
from serve_app.routes.dependencies import ListedOwner, Reader, ServicesOf, Writer, whose
from serve_app.routes.forms import FORM_BODY, SubmittedForm, submitted_form
from serve_app.routes.preferences import preferred_wait_s
from serve_app.routes.uploads import UploadSlot, upload_slot
from serve_app.routes.views import show, show_all
from serve_app.schemas import Restoration, RestorationPage

MAX_PAGE = 100
_EXTENSIONS = {OutputFormat.PNG: "png", OutputFormat.JPEG: "jpg", OutputFormat.WEBP: "webp"}

router = APIRouter(
    prefix="/api/v1/restorations",
    tags=["restorations"],
    responses=problems(
        *(Unauthenticated, Forbidden, DependencyUnavailable, RestorationError),
        malformed_request=422,
    ),
)


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=Restoration,
    responses={
        202: {
            "description": "accepted: the photo is stored, and the job will end",
            "headers": {
                "Location": header("path of the job"),
                "Preference-Applied": header("`wait=N` when the answer was waited for"),
            },
        },
        200: {
            "description": "the finished job (`Prefer: wait`), or the job of an earlier request "
            "with the same Idempotency-Key",
            "model": Restoration,
            "headers": {
                "Location": header("path of the job"),
                "Idempotent-Replayed": header("`true` for the job of an earlier request"),
                "Preference-Applied": header("`wait=N` when the answer was waited for"),
            },
        },
        **problems(
            InvalidRequest,
            UnknownWorkflow,
            IdempotencyConflict,
            ImageTooLarge,
            UnsupportedImage,
            InvalidParameters,
            InvalidWebhook,
            BrokenImage,
            QueueFull,
            StorageFull,
            RateLimited,
            TooManyUploads,
            bad_request=400,
            unsupported_media_type=415,
            malformed_request=422,
        ),
    },
    openapi_extra={"requestBody": FORM_BODY},
)
async def submit_restoration(
    request: Request,
    caller: Writer,
    services: ServicesOf,
    form: Annotated[SubmittedForm, Depends(submitted_form)],
    slot: Annotated[UploadSlot, Depends(upload_slot)],
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            max_length=MAX_NAME_CHARS,
            description="makes a repeated request harmless: it is answered with the same job",
        ),
    ] = None,
    prefer: Annotated[
        list[str] | None,
        Header(
            alias="Prefer",
            description="RFC 7240; `wait=N` waits up to N (at most 60) seconds for the end",
        ),
    ] = None,
) -> Response:
    """Submit a photo to be restored."""
    submitted = await services.submission.submit(
        form.fields.asks(caller, form.image, idempotency_key)
    )
    slot.give_back()  # the upload is stored: who waits for the end waits without it
    job, wait_s = submitted.job, preferred_wait_s(prefer or ())
    if wait_s is not None:
        job = await services.watcher.wait(job, wait_s)
    view = await show(request, services.status, job)
    headers = {"Location": view.links.self_}
    if submitted.replayed:
        headers["Idempotent-Replayed"] = "true"
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s}"
    is_done = submitted.replayed or (wait_s is not None and job.status.is_final)
    body = view.model_dump(mode="json", by_alias=True)
    return JSONResponse(body, 200 if is_done else 202, headers)


@router.get("", responses=problems(InvalidRequest))
async def list_restorations(
    request: Request,
    caller: Reader,
    owner: ListedOwner,
    services: ServicesOf,
    status: Annotated[
        list[JobStatus] | None, Query(description="only jobs in one of these; may be repeated")
    ] = None,
    cursor: Annotated[str | None, Query(description="opaque; follow `next` instead")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
) -> RestorationPage:
    """An owner's jobs, the caller's if none is named, newest first."""
    page = await services.jobs.list(owner, status or (), cursor, limit)
    following: str | None = None
    if page.next_cursor is not None:
        query = {"cursor": page.next_cursor, "limit": limit, "status": status or []}
        query |= whose(owner, caller)
        following = f"{request.url.path}?{urlencode(query, doseq=True)}"
    shown = await show_all(request, services.status, page.jobs)
    return RestorationPage(restorations=tuple(shown), next=following)


@router.get("/{job_id}", responses=problems(JobNotFound))
async def get_restoration(
    request: Request, job_id: UUID, caller: Reader, services: ServicesOf
) -> Restoration:
    """The job as it is now."""
    job = await services.jobs.get(job_id, caller.reach)
    return await show(request, services.status, job)


@router.post(
    "/{job_id}/cancel",
    status_code=status.HTTP_202_ACCEPTED,
    responses={
        202: {"description": "asked; the job goes on until its engine's next boundary"},
        200: {"description": "the job has ended, cancelled or otherwise", "model": Restoration},
        **problems(JobNotFound, RateLimited),
    },
)
async def cancel_restoration(
    request: Request, response: Response, job_id: UUID, caller: Writer, services: ServicesOf
) -> Restoration:
    """Cancel the job. Repeating it, or cancelling what has ended, changes nothing."""
    job = await services.jobs.request_cancel(job_id, caller.reach)
    if job.status.is_final:
        response.status_code = status.HTTP_200_OK
    return await show(request, services.status, job)


@router.post(
    "/{job_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    responses={
        202: {
            "description": "accepted: a new job on the same photo",
            "headers": {"Location": header("path of the new job")},
        },
        200: {
            "description": "the job that an earlier retry of this one made",
            "model": Restoration,
            "headers": {
                "Location": header("path of that job"),
                "Idempotent-Replayed": header("`true`"),
            },
        },
        **problems(
            *(JobNotFound, UnknownWorkflow, IllegalTransition, InvalidParameters, QueueFull),
            *(InputExpired, StorageFull, RateLimited),
        ),
    },
)
async def retry_restoration(
    request: Request, response: Response, job_id: UUID, caller: Writer, services: ServicesOf
) -> Restoration:
    """Send a job that failed or was cancelled again, as a new job. Repeating it changes nothing."""
    # an operator's quotas are not those of the job's owner
    quotas = caller.quotas if caller.reach == caller.sub else None
    submitted = await services.submission.retry(job_id, caller.reach, quotas)
    view = await show(request, services.status, submitted.job)
    response.headers["Location"] = view.links.self_
    if submitted.replayed:
        response.headers["Idempotent-Replayed"] = "true"
        response.status_code = status.HTTP_200_OK
    return view


@router.get(
    "/{job_id}/result",
    status_code=status.HTTP_307_TEMPORARY_REDIRECT,
    response_class=Response,
    responses={
        307: {
            "description": "where the picture is; the address works without a token for a while",
            "headers": {"Location": header("a signed URL")},
        },
        200: {
            "description": "the picture (`download=1`)",
            "content": {kind.content_type: {} for kind in OutputFormat},
            "headers": {"Content-Disposition": header("an attachment with a file name")},
        },
        **problems(JobNotFound, ResultNotReady, ResultExpired),
    },
)
async def get_result(
    job_id: UUID,
    caller: Reader,
    services: ServicesOf,
    download: Annotated[bool, Query(description="the bytes themselves, not a redirect")] = False,
) -> Response:
    """The restored photo."""
    job = await services.jobs.get(job_id, caller.reach)
    output, filename = job.result(), f"restored-{job.id}.{_EXTENSIONS[job.output_format]}"
    if not download:
        lifetime_s = services.settings.result_url_lifetime_s
        url = await services.blobs.signed_url(output, filename, lifetime_s)
        return RedirectResponse(url, headers={"Cache-Control": "no-store"})
    return Response(
        await services.blobs.get(output),
        media_type=output.content_type,
        headers={
            "Content-Disposition": f'attachment; filename="{filename}"',
            "Cache-Control": "private",
            "ETag": f'"{output.sha256}"',
        },
    )
