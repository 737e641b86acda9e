"""Errors as HTTP responses: one table of statuses, and RFC 9457 problems as bodies.

422 means malformed: the request does not match the OpenAPI document or the workflow's schema. For
server errors (500 and above) the client sees only the code and the request id; the details are in
the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from restoration import errors as e
from restoration.observability.metrics import REFUSED
from serve_app.schemas.restorations import Problem

log = structlog.get_logger(__name__)

PROBLEM_JSON = "application/problem+json"
RETRY_AFTER_S = 2
# Only refused changes are counted: a poll for a missing job is not a refused submission.
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
MALFORMED_REQUEST = "malformed_request"
# These replace pydantic's messages, which speak of Python's types.
_PLAINER = {
    "dict_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object, sent with Content-Type: application/json",
}

STATUS_OF: Mapping[type[e.RestorationError], HTTPStatus] = MappingProxyType(
    {
        e.InvalidRequest: HTTPStatus.BAD_REQUEST,
        e.UnsupportedImage: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        e.BrokenImage: HTTPStatus.UNPROCESSABLE_ENTITY,
        e.ImageTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        e.UploadTooSlow: HTTPStatus.REQUEST_TIMEOUT,
        e.BatchTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        e.BatchExpired: HTTPStatus.REQUEST_TIMEOUT,
        e.InvalidParameters: HTTPStatus.UNPROCESSABLE_ENTITY,
        e.UnknownWorkflow: HTTPStatus.NOT_FOUND,
        e.GraphRefused: HTTPStatus.UNPROCESSABLE_ENTITY,
        e.InvalidWebhook: HTTPStatus.UNPROCESSABLE_ENTITY,
        e.Unauthenticated: HTTPStatus.UNAUTHORIZED,
        e.Forbidden: HTTPStatus.FORBIDDEN,
        e.JobNotFound: HTTPStatus.NOT_FOUND,
        e.BatchNotFound: HTTPStatus.NOT_FOUND,
        e.UploadNotFound: HTTPStatus.NOT_FOUND,
        e.WorkerNotFound: HTTPStatus.NOT_FOUND,
        e.Conflict: HTTPStatus.CONFLICT,
        e.IdempotencyConflict: HTTPStatus.CONFLICT,
        e.UploadUsed: HTTPStatus.CONFLICT,
        e.ResultNotReady: HTTPStatus.CONFLICT,
        e.ResultExpired: HTTPStatus.GONE,
        e.InputExpired: HTTPStatus.GONE,
        e.IllegalTransition: HTTPStatus.CONFLICT,
        e.QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
        e.StorageFull: HTTPStatus.TOO_MANY_REQUESTS,
        e.RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
        e.TooManyAtOnce: HTTPStatus.TOO_MANY_REQUESTS,
        e.TooManyUploads: HTTPStatus.TOO_MANY_REQUESTS,
        e.DependencyUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
        e.EngineUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
        # The following reach a client only as the code of a failed job. If a request raises one, it
        # is an internal error.
        e.RestorationError: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.QueueTimeout: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.LeaseLost: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.EngineError: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.EngineCrashed: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.EngineStalled: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.EngineOutOfMemory: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.EngineTimeout: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.EngineRejected: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.EngineFailed: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.EngineInterrupted: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.ArtifactCorrupt: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.SetupError: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.InvalidSettings: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.WorkflowInvalid: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.ModelMissing: HTTPStatus.INTERNAL_SERVER_ERROR,
        e.ProvisionFailed: HTTPStatus.INTERNAL_SERVER_ERROR,
    }
)

_HEADERS: Mapping[HTTPStatus, Mapping[str, str]] = {
    # Otherwise the server would go on reading the rest of the body, for as long as the client sends
    # it.
    HTTPStatus.REQUEST_TIMEOUT: {"Connection": "close"},
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": str(RETRY_AFTER_S)},
}
_PRIVATE_DETAIL: Mapping[HTTPStatus, str] = {
    HTTPStatus.INTERNAL_SERVER_ERROR: "internal error; report the request id to the operator",
    HTTPStatus.SERVICE_UNAVAILABLE: "a service that this request needs is unavailable; try again",
}


def install_error_handlers(app: FastAPI) -> None:
    """Make the application answer its own, FastAPI's and Starlette's errors with problems."""
    app.exception_handler(e.RestorationError)(_on_restoration_error)
    app.exception_handler(RequestValidationError)(_on_malformed_request)
    app.exception_handler(HTTPException)(_on_http_exception)


def problem_response(
    request: Request,
    status: int,
    code: str,
    detail: str,
    details: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an RFC 9457 problem as the response to `request`, and count a refused change."""
    if request.method not in _SAFE_METHODS:
        request.app.state.services.meter.count(REFUSED, {"code": code})
    path, request_id = request.url.path, request.state.request_id
    return problem_document(status, code, detail, path, request_id, details, headers)


def problem_document(
    status: int,
    code: str,
    detail: str,
    instance: str,
    request_id: str,
    details: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an RFC 9457 problem as a response. Usable outside of the application too."""
    problem = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=instance,
        code=code,
        request_id=request_id,
        details=details or {},
    )
    return JSONResponse(problem.model_dump(), int(status), headers, media_type=PROBLEM_JSON)


def internal_error_response(request: Request) -> JSONResponse:
    """Return a 500 response that reveals nothing about the error."""
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return problem_response(request, status, e.RestorationError.code, _PRIVATE_DETAIL[status])


async def _on_restoration_error(request: Request, error: e.RestorationError) -> JSONResponse:
    status = next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)
    headers = _challenge(request, error) or _HEADERS.get(status)
    if (retry_after_s := error.details.get("retry_after_s")) is not None:
        headers = {"Retry-After": str(retry_after_s)}
    if (private := _PRIVATE_DETAIL.get(status)) is None:
        return problem_response(request, status, error.code, error.message, error.details, headers)
    log.error("request_failed", code=error.code, reason=error.message, exc_info=error)
    return problem_response(request, status, error.code, private, headers=headers)


def _challenge(request: Request, error: e.RestorationError) -> Mapping[str, str] | None:
    """Return the WWW-Authenticate header of RFC 6750, section 3, or None for other errors.

    A request without a bearer token gets no error code.
    """
    parts = ['Bearer realm="comfy-restore"']
    match error:
        case e.Unauthenticated():
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() == "bearer" and token.strip():
                parts.append('error="invalid_token"')
        case e.Forbidden():
            parts += ['error="insufficient_scope"', f'scope="{error.details["scope"]}"']
        case _:
            return None
    return {"WWW-Authenticate": ", ".join(parts)}


async def _on_malformed_request(request: Request, error: RequestValidationError) -> JSONResponse:
    problems = {
        ".".join(map(str, item["loc"])): _PLAINER.get(item["type"], item["msg"])
        for item in error.errors()
    }
    listing = "; ".join(f"{where}: {what}" for where, what in problems.items())
    return problem_response(
        request,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        MALFORMED_REQUEST,
        f"the request is malformed: {listing}",
        {"problems": problems},
    )


async def _on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    """Convert errors of the framework: unknown path, method not allowed, no multipart, ..."""
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    headers = dict(error.headers or {})
    allowed = headers.get("Allow", "").split(", ")
    if "GET" in allowed and "HEAD" not in allowed:
        headers["Allow"] = ", ".join([*allowed, "HEAD"])  # `serve_app.asgi.head_requests` serves it
    return problem_response(request, error.status_code, code, error.detail, headers=headers)
