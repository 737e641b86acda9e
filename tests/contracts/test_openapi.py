"""The OpenAPI document describes every route, error and header of the service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from serve_app.asgi.errors import PROBLEM_JSON
from serve_app.auth.scopes import Scope
from serve_app.schemas.restorations import Problem
from tests.fakes.site import API, open_site, photo, submission

BATCHES = "/api/v1/batches"
ADMIN = "/api/v1/admin"
RUNS = "/api/v1/runs"
OPEN = {"/healthz", "/readyz"}
Document = dict[str, Any]


@pytest.fixture
async def document() -> AsyncIterator[Document]:
    """Return the document as a client without a token gets it."""
    async with open_site() as site, site.client(sub=None) as client:
        answer = await client.get("/openapi.json")
        assert answer.status_code == 200
        yield answer.json()


def _operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def _resolve(document: Document, reference: str) -> Any:
    found: Any = document
    for key in reference.removeprefix("#/").split("/"):
        found = found[key]
    return found


def _references(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def test_it_is_openapi_3_1(document: Document) -> None:
    """Version and top level are valid, and every reference resolves."""
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"]
    assert document["info"]["version"]
    for reference in _references(document):
        assert _resolve(document, reference), reference
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_it_describes_every_route(document: Document) -> None:
    """The document has exactly these operations, with stable names for generated clients."""
    assert {(m.upper(), path): op["operationId"] for path, m, op in _operations(document)} == {
        ("POST", API): "submit_restoration",
        ("GET", API): "list_restorations",
        ("GET", f"{API}/{{job_id}}"): "get_restoration",
        ("POST", f"{API}/{{job_id}}/cancel"): "cancel_restoration",
        ("POST", f"{API}/{{job_id}}/retry"): "retry_restoration",
        ("GET", f"{API}/{{job_id}}/events"): "follow_restoration",
        ("GET", f"{API}/{{job_id}}/result"): "get_result",
        ("POST", "/api/v1/uploads"): "begin_upload",
        ("POST", RUNS): "submit_run",
        ("POST", BATCHES): "submit_batch",
        ("GET", BATCHES): "list_batches",
        ("GET", f"{BATCHES}/{{batch_id}}"): "get_batch",
        ("GET", f"{BATCHES}/{{batch_id}}/items"): "list_batch_items",
        ("POST", f"{BATCHES}/{{batch_id}}/cancel"): "cancel_batch",
        ("GET", f"{BATCHES}/{{batch_id}}/events"): "follow_batch",
        ("GET", "/api/v1/workflows"): "list_workflows",
        ("GET", "/api/v1/workflows/{name}"): "get_workflow",
        ("GET", "/api/v1/usage"): "get_usage",
        ("GET", f"{ADMIN}/workers"): "list_workers",
        ("POST", f"{ADMIN}/workers/{{worker}}/drain"): "drain_worker",
        ("POST", f"{ADMIN}/workers/{{worker}}/undrain"): "undrain_worker",
        ("POST", f"{ADMIN}/workers/{{worker}}/restart-engine"): "restart_engine",
        ("GET", f"{ADMIN}/queue"): "get_queue",
        ("GET", "/healthz"): "get_health",
        ("GET", "/readyz"): "get_readiness",
    }


@pytest.mark.auth
def test_every_route_but_health_wants_a_token_with_a_scope(document: Document) -> None:
    """The bearer scheme is declared, and every route but health requires it with one of our scopes
    and documents 401 and 403."""
    scheme = document["components"]["securitySchemes"]["bearer"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, _method, operation in _operations(document):
        wants_token = path not in OPEN
        if wants_token:
            [[scope]] = [each["bearer"] for each in operation["security"]]
            assert scope in set(Scope), path
        assert ("security" in operation) is wants_token, path
        assert ({"401", "403"} <= operation["responses"].keys()) is wants_token, path


def test_every_error_is_a_problem(document: Document) -> None:
    """Each 4xx and 5xx is a problem document and names its possible codes."""
    for path, method, operation in _operations(document):
        for status, response in operation["responses"].items():
            assert response["description"]
            if status >= "400" and path not in OPEN:
                reference = response["content"][PROBLEM_JSON]["schema"]["$ref"]
                assert reference.endswith(f"/{Problem.__name__}"), (method, path, status)
                assert list(response["content"]) == [PROBLEM_JSON]
                assert "`" in response["description"]


@pytest.mark.parametrize(
    ("path", "method", "statuses"),
    [
        (API, "post", "200 202 400 401 403 404 408 409 410 413 415 422 429 500 503"),
        (f"{API}/{{job_id}}", "get", "200 401 403 404 422 500 503"),
        (f"{API}/{{job_id}}/cancel", "post", "200 202 401 403 404 422 429 500 503"),
        (f"{API}/{{job_id}}/retry", "post", "200 202 401 403 404 409 410 422 429 500 503"),
        (f"{API}/{{job_id}}/events", "get", "200 400 401 403 404 422 429 500 503"),
        (f"{API}/{{job_id}}/result", "get", "200 206 307 401 403 404 409 410 416 422 429 500 503"),
        (RUNS, "post", "200 202 400 401 403 404 408 409 410 413 415 422 429 500 503"),
        ("/api/v1/uploads", "post", "201 400 401 403 413 422 429 500 503"),
        (BATCHES, "post", "200 202 400 401 403 404 408 409 413 415 422 429 500 503"),
        (f"{BATCHES}/{{batch_id}}", "get", "200 401 403 404 422 500 503"),
        (f"{BATCHES}/{{batch_id}}/items", "get", "200 401 403 404 422 500 503"),
        (f"{BATCHES}/{{batch_id}}/cancel", "post", "200 202 401 403 404 422 429 500 503"),
        (f"{BATCHES}/{{batch_id}}/events", "get", "200 401 403 404 422 429 500 503"),
        ("/readyz", "get", "200 503"),
    ],
)
def test_it_names_every_status(document: Document, path: str, method: str, statuses: str) -> None:
    """The document has exactly the statuses that the route answers with."""
    assert " ".join(sorted(document["paths"][path][method]["responses"])) == statuses


def _needs_a_photo_or_an_upload(form: Document) -> bool:
    """Return whether the schema requires exactly one of the two."""
    conditions = {key: form[key] for key in ("if", "then", "else")}
    accepts = Draft202012Validator(conditions).is_valid
    both = {"image": "", "upload_id": ""}
    one = accepts({"image": ""}) and accepts({"upload_id": ""})
    return one and not accepts(both) and not accepts({})


def test_the_form_and_the_headers_are_described(document: Document) -> None:
    """Fields and headers that the submission parses by itself are documented."""
    post = document["paths"][API]["post"]
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert _needs_a_photo_or_an_upload(form)
    assert set(form["properties"]) == {
        *("image", "workflow", "params", "output_format", "priority"),
        *("queue_limit_s", "run_limit_s", "webhook_url", "keep_metadata", "reuse", "upload_id"),
    }
    assert {p["name"] for p in post["parameters"]} == {"Idempotency-Key", "Prefer"}
    assert "Location" in post["responses"]["202"]["headers"]
    assert {"Idempotent-Replayed", "Preference-Applied"} <= set(post["responses"]["200"]["headers"])


@pytest.mark.runs
def test_the_form_of_a_run_is_described(document: Document) -> None:
    """The form has a graph, a photo or an upload, and the options of any job."""
    post = document["paths"][RUNS]["post"]
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["graph"]
    assert _needs_a_photo_or_an_upload(form)
    assert set(form["properties"]) == {
        *("image", "upload_id", "graph", "output_format", "priority"),
        *("queue_limit_s", "run_limit_s", "webhook_url", "keep_metadata", "reuse"),
    }


def test_the_form_of_a_batch_is_described(document: Document) -> None:
    """The form takes up to a thousand photos, and the fields of one job with two other defaults."""
    post = document["paths"][BATCHES]["post"]
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image"]
    assert set(form["properties"]) == {
        *("image", "workflow", "params", "output_format", "priority"),
        *("queue_limit_s", "run_limit_s", "webhook_url", "keep_metadata", "reuse"),
    }
    assert form["properties"]["priority"]["default"] == "batch"
    assert form["properties"]["reuse"]["default"] == "allow"
    assert (form["properties"]["image"]["type"], form["properties"]["image"]["maxItems"]) == (
        "array",
        1000,
    )
    assert "Idempotency-Key" in {parameter["name"] for parameter in post["parameters"]}


@pytest.mark.parametrize("path", [API, RUNS, BATCHES])
def test_a_form_is_described_as_generators_understand_it(document: Document, path: str) -> None:
    """Photos are files and come last; headers and fields have one type, which is never null."""
    post = document["paths"][path]["post"]
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert list(form["properties"])[-1] == "image"
    image = form["properties"]["image"]
    assert image.get("items", image)["format"] == "binary"
    assert not {"oneOf", "anyOf", "allOf"} & form.keys()
    described = [*form["properties"].values(), *(each["schema"] for each in post["parameters"])]
    assert all("type" in each or "$ref" in each for each in described)


def test_streams_and_pictures_have_their_types(document: Document) -> None:
    """Events are resumable Server-Sent Events, and a result is a picture."""
    events = document["paths"][f"{API}/{{job_id}}/events"]["get"]
    assert list(events["responses"]["200"]["content"]) == ["text/event-stream"]
    assert "Last-Event-ID" in {parameter["name"] for parameter in events["parameters"]}
    result = document["paths"][f"{API}/{{job_id}}/result"]["get"]["responses"]
    assert set(result["200"]["content"]) == {"image/png", "image/jpeg", "image/webp"}
    assert "Location" in result["307"]["headers"]


async def test_answers_are_as_described(document: Document) -> None:
    """Answers of every kind satisfy their published schemas."""
    async with open_site() as site, site.client() as client:
        job = await client.post(API, **submission())
        page = await client.get(API)
        problem = await client.get(f"{job.headers['location']}/result")
        readiness = await client.get("/readyz")
        photos = [("image", ("a.png", photo())), ("image", ("b.png", b"?"))]
        batch = await client.post(BATCHES, files=photos)
        items = await client.get(batch.json()["links"]["items"])
        batches = await client.get(BATCHES)
    for name, answer in [
        ("Restoration", job),
        ("RestorationPage", page),
        ("Problem", problem),
        ("Readiness", readiness),
        ("SubmittedBatchView", batch),
        ("BatchItems", items),
        ("BatchList", batches),
    ]:
        schema = {**document, "$ref": f"#/components/schemas/{name}"}
        Draft202012Validator(schema).validate(answer.json())
