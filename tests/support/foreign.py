"""Another owner's identifiers, tried on every route of an OpenAPI document that takes one.

Routes are found in the document. A parameter that is not listed here fails the test: add it to
OWNED if its values belong to an owner (the tests must then create one), else to PUBLIC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

OWNED = frozenset({"job_id", "batch_id"})
PUBLIC = frozenset({"name", "worker"})  # a workflow; a worker, whose routes need `admin`
# Headers in which two answers to the same request may differ.
_PASSING = frozenset({"date", "x-request-id", "ratelimit"})


@dataclass(frozen=True)
class Route:
    """An operation, and the name of the path parameter that identifies something owned."""

    method: str
    path: str
    parameter: str

    def to(self, identifier: object) -> str:
        return self.path.replace(f"{{{self.parameter}}}", str(identifier))


def routes_to_owned(document: Mapping[str, Any]) -> list[Route]:
    """Return every operation that takes the identifier of something owned."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            names = {each["name"] for each in operation.get("parameters", []) if _identifies(each)}
            unknown = names - OWNED - PUBLIC
            assert not unknown, (
                f"{method} {path}: whose are {unknown}? tests/support/foreign.py must know"
            )
            owned = sorted(names & OWNED)
            assert len(owned) <= 1, f"{method} {path}: tests/support/foreign.py tries one at a time"
            found += [Route(method.upper(), path, name) for name in owned]
    assert found
    return found


def _identifies(parameter: Mapping[str, Any]) -> bool:
    return bool(parameter["in"] == "path" or parameter["schema"].get("format") == "uuid")


def assert_as_if_missing(
    foreign: httpx.Response, missing: httpx.Response, foreign_id: object, missing_id: object
) -> None:
    """Assert that both answers are 404 and differ only in the identifiers and the request ids."""
    where = foreign.request.method, foreign.request.url.path
    assert (foreign.status_code, missing.status_code) == (404, 404), where
    assert _body(foreign, foreign_id) == _body(missing, missing_id), where
    assert _headers(foreign) == _headers(missing), where


def _body(answer: httpx.Response, identifier: object) -> dict[str, Any]:
    problem: dict[str, Any] = answer.json()
    assert problem.pop("request_id") == answer.headers["x-request-id"]
    return {name: str(value).replace(str(identifier), "ID") for name, value in problem.items()}


def _headers(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in _PASSING}
