"""Parse the service's responses: as models, or as an ApiError."""

from __future__ import annotations

from http import HTTPStatus
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from serve_app.schemas.restorations import Problem

_Model = TypeVar("_Model", bound=BaseModel)


class ApiError(Exception):
    """A failed request.

    `code` is stable: the service's own, `unreachable` (status 0) without a response, `bad_answer`
    for a response that is not the service's, or `corrupt_download`.
    """

    def __init__(self, code: str, status: int, message: str, request_id: str = "") -> None:
        super().__init__(code, status, message, request_id)
        self.code = code
        self.status = status
        self.message = message
        self.request_id = request_id

    @property
    def refused(self) -> bool:
        """Return whether the service refused the request; else it or its response was lost."""
        return HTTPStatus.BAD_REQUEST <= self.status < HTTPStatus.INTERNAL_SERVER_ERROR

    def __str__(self) -> str:
        quoted = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.message} [{self.code}]{quoted}"


def error_of(answer: httpx.Response) -> ApiError:
    """Return the problem in a response as an ApiError, or `bad_answer` if it holds none."""
    try:
        problem = Problem.model_validate_json(answer.content)
    except ValidationError:
        message = (
            f"HTTP {answer.status_code} {answer.reason_phrase}: the response is not from the "
            "service"
        )
        return ApiError("bad_answer", answer.status_code, message)
    return ApiError(problem.code, problem.status, problem.detail, problem.request_id)


def parse(model: type[_Model], answer: httpx.Response) -> _Model:
    """Return the response's JSON as a `model`. Raises ApiError (`bad_answer`) if it is none."""
    try:
        return model.model_validate_json(answer.content)
    except ValidationError:
        message = f"the response from {answer.url} is not a valid {model.__name__}"
        raise ApiError("bad_answer", answer.status_code, message) from None
