"""The operators' routes, on a registry in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from restoration.workers import EngineState, JobInHand, Stage, WorkerReport
from serve_app.auth.scopes import Scope
from tests.fakes.site import Site, open_site

ADMIN = "/api/v1/admin"
JOB = JobInHand(uuid4(), "restore", Stage.STAGED, datetime(2030, 1, 1, tzinfo=UTC))
URL, VERSION = "http://127.0.0.1:8188", "0.3.75"
REPORT = WorkerReport("w1", "node", URL, EngineState.READY, 2, (JOB,), 0, VERSION)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site() as site:
        await site.workers.report(REPORT)
        yield site


@pytest.mark.fleet
async def test_workers_are_listed_with_what_they_have_in_hand(site: Site) -> None:
    """Each shows its last report, beside the clock of its times."""
    async with site.client(scopes=[Scope.ADMIN]) as admin:
        answer = (await admin.get(f"{ADMIN}/workers")).json()
    [worker] = answer["workers"]
    assert worker["in_hand"] == [
        {
            "job_id": str(JOB.job_id),
            "workflow": "restore",
            "stage": "staged",
            "claimed_at": "2030-01-01T00:00:00Z",
        }
    ]
    assert (worker["node"], worker["engine"], worker["engine_starts"]) == ("node", "ready", 2)
    assert worker["engine_version"] == VERSION
    assert worker["seen_at"] <= answer["at"]


@pytest.mark.fleet
async def test_orders_reach_the_worker(site: Site) -> None:
    """Each answer shows the worker's present state, and its next report brings the order."""
    async with site.client(scopes=[Scope.ADMIN]) as admin:
        assert (await admin.post(f"{ADMIN}/workers/w1/drain")).json()["drained"] is True
        told = await admin.post(f"{ADMIN}/workers/w1/restart-engine")
        assert told.json()["engine_restart_pending"] is True
        orders = await site.workers.report(REPORT)
        assert (orders.drained, orders.restarts_asked) == (True, 1)
        assert (await admin.post(f"{ADMIN}/workers/w1/undrain")).json()["drained"] is False
        assert not (await site.workers.report(REPORT)).drained


@pytest.mark.fleet
@pytest.mark.parametrize("order", ["drain", "undrain", "restart-engine"])
async def test_an_unknown_worker_is_404(site: Site, order: str) -> None:
    """The problem has its own code, and no order is kept for a future worker."""
    async with site.client(scopes=[Scope.ADMIN]) as admin:
        answer = await admin.post(f"{ADMIN}/workers/w2/{order}")
    assert (answer.status_code, answer.json()["code"]) == (404, "worker_not_found")
    assert answer.headers["content-type"] == "application/problem+json"
    assert list(site.workers.states) == ["w1"]


@pytest.mark.fleet
async def test_the_queue_counts_everybodys_jobs(site: Site) -> None:
    """Jobs are counted by class, with the age of the oldest."""
    await site.submit("ann")
    await site.submit("bob", priority="batch")
    async with site.client(scopes=[Scope.ADMIN]) as admin:
        queue = (await admin.get(f"{ADMIN}/queue")).json()
    counts = [(line["priority"], line["waiting"], line["running"]) for line in queue["lines"]]
    assert counts == [("interactive", 1, 0), ("batch", 1, 0)]
    assert all(line["oldest_at"] <= queue["at"] for line in queue["lines"])


@pytest.mark.fleet
async def test_users_are_refused(site: Site) -> None:
    """The scopes for restoring photos open none of these routes."""
    async with site.client() as user:
        for path in ("workers", "queue"):
            assert (await user.get(f"{ADMIN}/{path}")).status_code == 403
        assert (await user.post(f"{ADMIN}/workers/w1/drain")).status_code == 403
    assert not site.workers.states["w1"].orders.drained
