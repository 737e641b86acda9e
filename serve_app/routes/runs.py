"""/api/v1/runs: run a graph of the caller's own, as a job like any other."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response, status

from restoration.errors import (
    GraphRefused,
)
from serve_app.auth.scopes import Scope
from serve_app.auth.tokens import Principal
from serve_app.forms.form import RUN_BODY, RunForm, read_submission
from serve_app.forms.upload_bytes import PhotoShare
from serve_app.forms.upload_slots import UploadSlot
from serve_app.routes.dependencies import COMMON_PROBLEMS, ServicesOf, require
from serve_app.routes.submissions import IdempotencyKey, Prefer, answer, submission_responses
from serve_app.schemas.restorations import Restoration

router = APIRouter(prefix="/api/v1/runs", tags=["runs"], responses=COMMON_PROBLEMS)


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=Restoration,
    responses=submission_responses(GraphRefused),
    openapi_extra={"requestBody": RUN_BODY},
)
async def submit_run(
    request: Request,
    caller: Annotated[Principal, require(Scope.RUN)],
    services: ServicesOf,
    slot: UploadSlot,
    prefer: Prefer,
    share: PhotoShare,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit a photo and a graph to run on it."""
    submitted = await services.submission.submit(
        await read_submission(request, RunForm, caller, share, idempotency_key)
    )
    share.give_back()
    slot.give_back()
    return await answer(request, caller, services, submitted, prefer)
