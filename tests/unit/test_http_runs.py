"""POST /api/v1/runs: who may use it, its refusals, and its effects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from persistence.objects.keys import upload_key
from restoration.jobs import JobStatus
from serve_app.auth.scopes import USER_SCOPES, Scope
from tests.fakes.site import API, Site, open_site, photo
from tests.unit.test_graphs import graph, node, scale
from workflows.custom import graph_of
from workflows.manifest import CUSTOM

RUNS = "/api/v1/runs"
RUNNER = (*USER_SCOPES, Scope.RUN)


@pytest.fixture
async def client(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with site.client("ann", RUNNER) as client:
        yield client


def run(sent: object = None, **fields: str) -> dict[str, Any]:
    """Return arguments for a POST of a photo and a graph."""
    text = json.dumps(graph(scale(2)) if sent is None else sent)
    return {"files": {"image": ("photo.png", photo())}, "data": {"graph": text, **fields}}


@pytest.mark.runs
async def test_a_graph_becomes_a_job(site: Site, client: httpx.AsyncClient) -> None:
    """It has the same kind and place as others, with the checked graph in its row."""
    answer = await client.post(RUNS, **run(output_format="webp", priority="batch"))
    body = answer.json()
    job = site.jobs.rows[UUID(body["id"])]
    assert (answer.status_code, body["status"], body["workflow"]) == (202, "queued", CUSTOM)
    assert answer.headers["location"] == f"{API}/{job.id}"
    assert body["params"] == {}
    assert (job.owner, job.output_format, job.options.priority) == ("ann", "webp", "batch")
    assert graph_of(job.params)["2"] == graph(scale(2))["2"]
    assert site.blobs.objects[job.input.key] == photo()


@pytest.mark.runs
@pytest.mark.parametrize("scopes", [USER_SCOPES, (Scope.ADMIN,), ()])
async def test_it_takes_a_scope_of_its_own(site: Site, scopes: tuple[str, ...]) -> None:
    """Scopes for restoring photos or looking after others' jobs do not allow graphs."""
    async with site.client("ann", scopes) as client:
        answer = await client.post(RUNS, **run())
    assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
    assert site.jobs.rows == {}


@pytest.mark.runs
async def test_no_other_way_in(site: Site, client: httpx.AsyncClient) -> None:
    """The name of such jobs' workflow is not accepted, alone or in a batch, nor listed."""
    params = json.dumps({"graph": json.dumps(graph())})
    form = {"data": {"workflow": CUSTOM, "params": params}, "files": {"image": photo()}}
    for path in (API, "/api/v1/batches"):
        answer = await client.post(path, **form)  # type: ignore[arg-type] # one form for both
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_workflow")
    assert (await client.get(f"/api/v1/workflows/{CUSTOM}")).status_code == 404
    assert site.jobs.rows == {}


@pytest.mark.runs
@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (graph(node("SaveLatent")), 422, "graph_refused"),
        (graph(scale(2000)), 422, "graph_refused"),
        ([], 422, "malformed_request"),
        (None, 422, "malformed_request"),
        ({}, 422, "graph_refused"),
        ({"n" * 70_000: {}}, 422, "malformed_request"),
    ],
    ids=["class", "size", "list", "null", "empty", "long"],
)
async def test_a_refusal_says_why(
    site: Site, client: httpx.AsyncClient, sent: object, status: int, code: str
) -> None:
    """A refusal is a problem with a code, and with the graph's node. Nothing is stored."""
    form = run(sent) | {"data": {"graph": json.dumps(sent)}}
    answer = await client.post(RUNS, **form)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    if code == "graph_refused" and sent:
        assert answer.json()["details"]["node"] == "2"
    assert (site.jobs.rows, site.blobs.objects) == ({}, {})


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63, 2**53 + 1, -1])
async def test_a_seed_is_recorded_to_the_last_digit(seed: int) -> None:
    async with open_site(runs_allowed_nodes="LoadImage,SaveImage,ImageAddNoise") as site:
        async with site.client("ann", RUNNER) as client:
            answer = await client.post(RUNS, **run(graph(node("ImageAddNoise", seed=seed))))
        job = site.jobs.rows[UUID(answer.json()["id"])]
    assert graph_of(job.params)["2"]["inputs"]["seed"] == seed


async def test_what_the_editor_saves_is_told_how_to_export(client: httpx.AsyncClient) -> None:
    answer = await client.post(RUNS, **run({"nodes": [], "links": [], "version": 0.4}))
    assert (answer.status_code, answer.json()["code"]) == (422, "graph_refused")
    assert "Export (API)" in answer.json()["detail"]


@pytest.mark.runs
async def test_deep_json_is_no_crash(site: Site, client: httpx.AsyncClient) -> None:
    """Endless brackets are malformed."""
    for text in ('{"1":' * 9000, "[" * 60_000, '{"a":' * 150 + "1" + "}" * 150):
        answer = await client.post(RUNS, **run() | {"data": {"graph": text}})
        assert (answer.status_code, answer.json()["code"]) in {
            (422, "malformed_request"),
            (422, "graph_refused"),
        }


@pytest.mark.runs
async def test_a_result_must_fit_its_format(client: httpx.AsyncClient) -> None:
    """As for built-in workflows: no WebP has a side above 16,383."""
    sent = graph(node("ImageScale", width=20_000, height=10))
    answer = await client.post(RUNS, **run(sent, output_format="webp"))
    assert (answer.status_code, answer.json()["code"]) == (413, "image_too_large")


@pytest.mark.runs
async def test_a_run_may_use_an_upload(site: Site, client: httpx.AsyncClient) -> None:
    """The owner may use its own upload once; another's is not found."""
    mine, anothers = uuid4(), uuid4()
    await site.blobs.put(upload_key("ann", mine), photo(), "image/png")
    await site.blobs.put(upload_key("bob", anothers), photo(), "image/png")

    async def send(upload_id: UUID) -> int:
        parts = {"graph": json.dumps(graph()), "upload_id": str(upload_id)}
        files = {name: (None, text.encode()) for name, text in parts.items()}
        return (await client.post(RUNS, files=files)).status_code

    assert [await send(mine), await send(mine), await send(anothers)] == [202, 200, 404]


@pytest.mark.runs
async def test_the_same_key_means_the_same_graph(client: httpx.AsyncClient) -> None:
    """Another graph under a used key is a conflict."""
    headers = {"Idempotency-Key": "k"}
    first = await client.post(RUNS, **run(), headers=headers)
    again = await client.post(RUNS, **run(), headers=headers)
    other = await client.post(RUNS, **run(graph(scale(3))), headers=headers)
    assert [first.status_code, again.status_code, other.status_code] == [202, 200, 409]


@pytest.mark.runs
async def test_limits_and_queue_are_those_of_jobs() -> None:
    """A full queue refuses a run like a restoration, and each counts for the other."""
    async with open_site(max_waiting_per_owner=1) as site, site.client("ann", RUNNER) as client:
        assert (await client.post(RUNS, **run(run_limit_s="601"))).status_code == 400
        assert (await client.post(RUNS, **run())).status_code == 202
        assert (await client.post(RUNS, **run())).status_code == 429


@pytest.mark.runs
async def test_a_retry_runs_under_the_rules_of_its_time(site: Site) -> None:
    """The token must allow graphs; a job whose graph is no longer allowed stays ended."""
    async with site.client("ann", RUNNER) as runner, site.client("ann") as user:
        body = (await runner.post(RUNS, **run())).json()
        await runner.post(body["links"]["cancel"])
        assert site.jobs.rows[UUID(body["id"])].status is JobStatus.CANCELLED
        assert (await user.post(body["links"]["retry"])).status_code == 403
        async with open_site(runs_allowed_nodes="LoadImage,SaveImage") as stricter:
            stricter.jobs.rows.update(site.jobs.rows)
            async with stricter.client("ann", RUNNER) as later:
                answer = await later.post(body["links"]["retry"])
                assert (answer.status_code, answer.json()["code"]) == (422, "graph_refused")
        assert (await runner.post(body["links"]["retry"])).status_code == 202
