"""Other people's identifiers, tried on every route of an OpenAPI document that takes one.

A route is found by itself. A parameter that nobody has said anything about here fails the test:
say whether its values are somebody's (OWNED, and have the tests make one) or everybody's (PUBLIC).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

OWNED = frozenset({"job_id", "batch_id"})
PUBLIC = frozenset({"name", "worker"})  # of a workflow; of a worker, which is for `admin` alone
# What two answers to the same question may differ in.
_PASSING = frozenset({"date", "x-request-id", "ratelimit"})


@dataclass(frozen=True)
class Route:
    """An operation, and the name of the parameter in its path that identifies something owned."""

    method: str
    path: str
    parameter: str

    def to(self, identifier: object) -> str:
        return self.path.replace(f"{{{self.parameter}}}", str(identifier))


def routes_to_owned(document: Mapping[str, Any]) -> list[Route]:
    """Every operation that takes an identifier of something that an owner has."""
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
    """Both are 404, and alike but for the identifiers in them and the request's own id."""
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
