"""The running stack held to its own OpenAPI document: a few requests for every operation.

In much larger number they are sent to the same routes with stores in memory, in
tests/contracts/test_document.py; here Postgres, S3, Redis and Serve are behind them.
"""

from __future__ import annotations

import pytest

from tests.fakes.site import photo
from tests.support.conformance import Service, demand_conformance
from tests.support.stack import Stack


@pytest.fixture
def ended_job(stack: Stack) -> str:
    """A stream of its events ends, and so does a test that reads it."""
    with stack.client("schemathesis") as client:
        job = client.cancel(client.submit(photo((64, 64))).id)
        return str(client.wait(job.id).id)


def test_the_stack_answers_as_described(stack: Stack, ended_job: str) -> None:
    """No 5xx and nothing outside the document, with a token."""
    known = {"job_id": ended_job, "name": "restore"}
    service = Service(stack.record.url, stack.token("schemathesis"), known)
    seen = demand_conformance(service, service.document(), examples=8)
    assert all(max(statuses) < 500 for statuses in seen.values())


def test_the_stack_asks_everybody_for_a_token(stack: Stack) -> None:
    """Without one, 401 is all that any operation says, but for the health checks."""
    service = Service(stack.record.url)
    seen = demand_conformance(service, service.document(), examples=3)
    kept = {operation for operation, statuses in seen.items() if statuses != {401}}
    assert kept == {"GET /healthz", "GET /readyz"}
