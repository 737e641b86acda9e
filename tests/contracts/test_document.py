"""The HTTP layer answers as its OpenAPI document says, for every operation, present or future."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from schemathesis.core.failures import FailureGroup

from tests.fakes.live_site import LiveSite, open_live_site
from tests.fakes.receiver import SECRET
from tests.fakes.site import photo
from tests.support.conformance import Service, demand_conformance

BATCHES = "/api/v1/batches"
# Generated values would hardly ever be valid.
FORM = {
    "image": photo(),
    "workflow": "restore",
    "params": "{}",
    "queue_limit_s": "60",
    "run_limit_s": "60",
    "webhook_url": "https://example.com/hook",
}
OPEN = {"GET /healthz", "GET /readyz"}


async def _known(live: LiveSite) -> dict[str, Any]:
    """Return values that cannot be generated: ids of an ended job and its batch, and form
    fields."""
    async with live.site.client() as client:
        files = [("image", ("a.png", photo(), "image/png"))]
        batch = (await client.post(BATCHES, files=files)).json()
    job_id = batch["items"][0]["job_id"]
    await live.site.succeed(await live.site.start(UUID(job_id)))
    return {"job_id": job_id, "batch_id": batch["id"], "name": "restore"} | FORM


async def test_with_a_token_every_answer_is_as_described() -> None:
    """There is no 5xx, and no status, header, type or body that the document does not have."""
    async with open_live_site(webhook_secret=SECRET) as live:
        service = Service(live.url, live.site.token(), await _known(live))
        document = await asyncio.to_thread(service.document)
        seen = await asyncio.to_thread(demand_conformance, service, document, 40)
    assert len(seen) == sum(map(len, document["paths"].values()))
    # Some requests were valid; otherwise the checks would prove little.
    assert {202, 422} <= seen["POST /api/v1/restorations"]
    assert {200, 404, 422} <= seen["GET /api/v1/restorations/{job_id}"]
    assert {200, 404, 422} <= seen["GET /api/v1/batches/{batch_id}/events"]


async def test_without_a_token_every_answer_is_401() -> None:
    """Requests without a valid token get 401 for any content, except for the health checks."""
    async with open_live_site() as live:
        service = Service(live.url, None, await _known(live))
        document = await asyncio.to_thread(service.document)
        seen = await asyncio.to_thread(demand_conformance, service, document, 8)
    assert {operation for operation, statuses in seen.items() if statuses != {401}} == OPEN


@pytest.mark.parametrize("hidden", ["200", "404", "422"])
async def test_what_the_document_hides_is_found(hidden: str) -> None:
    """An answer that the document does not name makes the check fail."""
    path = "/api/v1/restorations/{job_id}"
    async with open_live_site() as live:
        service = Service(live.url, live.site.token(), await _known(live))
        document = await asyncio.to_thread(service.document)
        del document["paths"][path]["get"]["responses"][hidden]
        document["paths"] = {path: document["paths"][path]}
        with pytest.raises(FailureGroup, match="Undocumented status code"):
            await asyncio.to_thread(demand_conformance, service, document, 40)
