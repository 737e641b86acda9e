"""The table of statuses, and the problems that clients get."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from restoration.errors import DependencyUnavailable, RestorationError
from serve_app.asgi.errors import PROBLEM_JSON, STATUS_OF
from serve_app.schemas.restorations import Problem
from tests.fakes.site import API, Site, submission


def _family(kind: type[RestorationError]) -> Iterator[type[RestorationError]]:
    """Return the vocabulary's errors; a subclass elsewhere is answered like its parent."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == kind.__module__:
            yield from _family(child)


@pytest.mark.parametrize("kind", list(_family(RestorationError)), ids=lambda kind: kind.__name__)
def test_every_error_crosses_processes_and_has_a_status(kind: type[RestorationError]) -> None:
    """Each class survives pickling unchanged and is in the table itself, not by inheritance."""
    error = pickle.loads(pickle.dumps(kind("it broke", job_id="7")))  # noqa: S301 # our own
    assert (type(error), error.message, error.details) == (kind, "it broke", {"job_id": "7"})
    assert isinstance(STATUS_OF[kind], HTTPStatus)


def test_a_retryable_error_is_never_the_clients_fault() -> None:
    """An error that another attempt may cure is answered with 500 or above."""
    assert all(STATUS_OF[kind] >= 500 for kind in STATUS_OF if kind.retryable)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("DELETE", API, 405, "method_not_allowed"),
        ("GET", f"{API}/not-a-uuid", 422, "malformed_request"),
        ("GET", f"{API}?limit=101", 422, "malformed_request"),
        ("GET", f"{API}?cursor=zzz", 400, "invalid_request"),
        ("GET", f"{API}/00000000-0000-0000-0000-000000000000", 404, "job_not_found"),
        ("GET", "/api/v1/workflows/nope", 404, "unknown_workflow"),
    ],
)
async def test_every_refusal_is_a_problem(
    site: Site, method: str, path: str, status: int, code: str
) -> None:
    """RFC 9457 with a stable code and the request's id, from the framework as well as from us."""
    async with site.client() as client:
        answer = await client.request(method, path, headers={"X-Request-Id": "req-1"})
    problem = Problem.model_validate_json(answer.content)
    assert answer.headers["content-type"] == PROBLEM_JSON
    assert (answer.status_code, problem.status, problem.code) == (status, status, code)
    assert problem.instance == path.partition("?")[0]
    assert problem.request_id == "req-1"


async def test_a_malformed_request_names_each_wrong_input(site: Site) -> None:
    """`details.problems` maps each fault's place to its message."""
    async with site.client() as client:
        answer = await client.get(API, params={"limit": 0, "status": "done"})
    assert set(answer.json()["details"]["problems"]) == {"query.limit", "query.status.0"}


async def test_a_crash_tells_clients_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception is a 500 problem that shows nothing of the exception."""

    async def crash(*_: object) -> None:
        raise RuntimeError("password is hunter2")

    monkeypatch.setattr(site.jobs, "get", crash)
    async with site.client() as client:
        answer = await client.get(f"{API}/00000000-0000-0000-0000-000000000000")
    problem = Problem.model_validate_json(answer.content)
    assert (problem.status, problem.code) == (500, "internal_error")
    assert problem.request_id == answer.headers["x-request-id"]
    assert "hunter2" not in answer.text


async def test_an_outage_is_503_and_keeps_addresses_to_itself(site: Site) -> None:
    """The answer asks clients to come back, without the dependency's address."""
    site.jobs.down = True
    async with site.client() as client:
        answer = await client.post(API, **submission())
    assert (answer.status_code, answer.json()["code"]) == (503, DependencyUnavailable.code)
    assert int(answer.headers["retry-after"]) > 0
    assert "db.internal" not in answer.text
