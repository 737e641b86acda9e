"""/api/v1/restorations: submit, list, get, cancel and retry jobs, and fetch their results.

Another owner's job is 404.
"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response, status
from fastapi.responses import RedirectResponse

from restoration.errors import (
    Forbidden,
    IllegalTransition,
    InputExpired,
    InvalidParameters,
    InvalidRequest,
    JobNotFound,
    QueueFull,
    RateLimited,
    ResultExpired,
    ResultNotReady,
    StorageFull,
    TooManyAtOnce,
    UnknownWorkflow,
)
from restoration.jobs import JobStatus
from serve_app.asgi.openapi import PICTURES, header, problems
from serve_app.auth.scopes import Scope
from serve_app.forms.form import FORM_BODY, RestorationForm, read_submission
from serve_app.forms.upload_bytes import PhotoShare
from serve_app.forms.upload_slots import UploadSlot
from serve_app.routes.dependencies import (
    COMMON_PROBLEMS,
    ListedOwner,
    Reader,
    ServicesOf,
    Writer,
    next_page,
)
from serve_app.routes.downloads import Download
from serve_app.routes.results import filename_of, picture
from serve_app.routes.submissions import IdempotencyKey, Prefer, answer, submission_responses
from serve_app.routes.views import show, show_all
from serve_app.schemas.restorations import Restoration, RestorationPage
from workflows.manifest import CUSTOM

MAX_PAGE = 100
DOWNLOAD_HEADERS = {
    "Content-Disposition": header("An attachment with a file name."),
    "ETag": header("SHA-256 of the whole result, in hexadecimal."),
    "Accept-Ranges": header("`bytes`"),
    "Repr-Digest": header("SHA-256 of the whole result (RFC 9530)."),
}

router = APIRouter(prefix="/api/v1/restorations", tags=["restorations"], responses=COMMON_PROBLEMS)


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=Restoration,
    responses=submission_responses(UnknownWorkflow, InvalidParameters),
    openapi_extra={"requestBody": FORM_BODY},
)
async def submit_restoration(
    request: Request,
    caller: Writer,
    services: ServicesOf,
    slot: UploadSlot,
    prefer: Prefer,
    share: PhotoShare,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit a photo to be restored."""
    # The request is not named here, so that its photo leaves the memory before the answer is sent.
    submitted = await services.submission.submit(
        await read_submission(request, RestorationForm, caller, share, idempotency_key)
    )
    share.give_back()
    slot.give_back()  # the upload is stored: waiting for the end of the job needs no slot
    return await answer(request, caller, services, submitted, prefer)


@router.get("", responses=problems(InvalidRequest))
async def list_restorations(
    request: Request,
    caller: Reader,
    owner: ListedOwner,
    services: ServicesOf,
    status: Annotated[
        list[JobStatus] | None, Query(description="Only jobs with this status. May be repeated.")
    ] = None,
    cursor: Annotated[
        str | None,
        Query(description="Opaque position in the list. Follow `next` instead of building it."),
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=MAX_PAGE, description="Maximum number of items in a page.")
    ] = 50,
) -> RestorationPage:
    """List an owner's jobs, by default the caller's, newest first."""
    page = await services.jobs.list(owner, status or (), cursor, limit)
    shown = await show_all(request, services.status, page.jobs)
    following = next_page(request, caller, owner, page.next_cursor, limit=limit, status=status)
    return RestorationPage(restorations=tuple(shown), next=following)


@router.get("/{job_id}", responses=problems(JobNotFound))
async def get_restoration(
    request: Request, job_id: UUID, caller: Reader, services: ServicesOf
) -> Restoration:
    """Return a job as it is now."""
    job = await services.jobs.get(job_id, caller.reach)
    return await show(request, services.status, job)


@router.post(
    "/{job_id}/cancel",
    status_code=status.HTTP_202_ACCEPTED,
    responses={
        202: {
            "description": "Cancellation was requested. A running job stops at its engine's next "
            "node or step."
        },
        200: {"description": "The job has ended, cancelled or not.", "model": Restoration},
        **problems(JobNotFound, RateLimited),
    },
)
async def cancel_restoration(
    request: Request, response: Response, job_id: UUID, caller: Writer, services: ServicesOf
) -> Restoration:
    """Cancel a job. Repeating it, or cancelling a job that has ended, changes nothing."""
    job = await services.jobs.request_cancel(job_id, caller.reach)
    if job.status.is_final:
        response.status_code = status.HTTP_200_OK
    return await show(request, services.status, job)


@router.post(
    "/{job_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    responses={
        202: {
            "description": "Accepted: a new job for the same photo.",
            "headers": {"Location": header("Path of the new job.")},
        },
        200: {
            "description": "The job that an earlier retry of this job created.",
            "model": Restoration,
            "headers": {
                "Location": header("Path of that job."),
                "Idempotent-Replayed": header("`true`"),
            },
        },
        **problems(
            JobNotFound,
            UnknownWorkflow,
            IllegalTransition,
            InvalidParameters,
            QueueFull,
            InputExpired,
            StorageFull,
            RateLimited,
        ),
    },
)
async def retry_restoration(
    request: Request, response: Response, job_id: UUID, caller: Writer, services: ServicesOf
) -> Restoration:
    """Submit a failed or cancelled job again, as a new job. Repeating it changes nothing."""
    source = await services.jobs.get(job_id, caller.reach)
    if source.workflow == CUSTOM and Scope.RUN not in caller.scopes:
        raise Forbidden(f"the token lacks the scope {Scope.RUN}", scope=Scope.RUN)
    # an operator's quotas do not apply to another owner's job
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
            "description": "Redirect to the result. The URL is valid without a token for a "
            "limited time.",
            "headers": {"Location": header("Signed URL of the result.")},
        },
        200: {
            "description": "The result (`download=1`).",
            "content": PICTURES,
            "headers": DOWNLOAD_HEADERS,
        },
        206: {
            "description": "The part of the result that `Range` selects.",
            "content": PICTURES,
            "headers": {
                **DOWNLOAD_HEADERS,
                "Content-Range": header("The range sent, and the size of the result."),
            },
        },
        **problems(
            JobNotFound,
            ResultNotReady,
            ResultExpired,
            TooManyAtOnce,
            requested_range_not_satisfiable=416,
        ),
    },
)
async def get_result(
    request: Request,
    job_id: UUID,
    caller: Reader,
    services: ServicesOf,
    download: Annotated[
        bool, Query(description="Return the result itself instead of a redirect.")
    ] = False,
    _range: Annotated[
        str | None,
        Header(alias="Range", description="One range of bytes (RFC 9110). Only with `download=1`."),
    ] = None,
    _if_range: Annotated[
        str | None, Header(alias="If-Range", description="The ETag that the range refers to.")
    ] = None,
) -> Response:
    """Return the restored photo, or redirect to it."""
    job = await services.jobs.get(job_id, caller.reach)
    if download:
        return Download(await picture(request, services.blobs, job, {}), caller.sub)
    lifetime_s = services.settings.result_url_lifetime_s
    url = await services.blobs.signed_url(job.result(), filename_of(job), lifetime_s)
    return RedirectResponse(url, headers={"Cache-Control": "no-store"})
