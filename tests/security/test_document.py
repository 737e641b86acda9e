"""The running stack answers as its OpenAPI document says, with a few requests per operation.

tests/contracts/test_document.py sends many more to the same routes with in-memory stores; here the
routes use Postgres, S3, Redis and Serve.
"""

from __future__ import annotations

import pytest

from tests.fakes.site import photo
from tests.support.conformance import Service, demand_conformance
from tests.support.stack import Stack


@pytest.fixture
def ended_job(stack: Stack) -> str:
    """Return the id of an ended job, whose event stream ends, so that a test can read it."""
    with stack.client("schemathesis") as client:
        job = client.cancel(client.submit(photo((64, 64))).id)
        return str(client.wait(job.id).id)


def test_the_stack_answers_as_described(stack: Stack, ended_job: str) -> None:
    """With a token there is no 5xx, and nothing outside the document."""
    known = {"job_id": ended_job, "name": "restore"}
    service = Service(stack.record.url, stack.token("schemathesis"), known)
    seen = demand_conformance(service, service.document(), examples=8)
    assert all(max(statuses) < 500 for statuses in seen.values())


def test_the_stack_asks_everybody_for_a_token(stack: Stack) -> None:
    """Without a token every operation answers 401, except for the health checks."""
    service = Service(stack.record.url)
    seen = demand_conformance(service, service.document(), examples=3)
    kept = {operation for operation, statuses in seen.items() if statuses != {401}}
    assert kept == {"GET /healthz", "GET /readyz"}
