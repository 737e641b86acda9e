"""Forms as browsers, curl and HTTP libraries send them: accepted as meant, or refused by field."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import fields
from itertools import permutations
from uuid import UUID

import httpx
import pytest

from persistence.postgres.tables import jobs
from restoration.jobs import Job, JobOptions, OutputFormat, Priority
from restoration.reuse import Reuse
from serve_app.auth.scopes import USER_SCOPES, Scope
from serve_app.forms.form import JobForm
from tests.fakes.batch_forms import BATCHES, BROKEN, MULTIPART
from tests.fakes.site import API, Site, photo
from tests.unit.test_graphs import graph, scale

RUNS = "/api/v1/runs"
PHOTO = photo()
BOM = b"\xef\xbb\xbf"
END = b"--b--\r\n"


def part(disposition: str, data: bytes, *headers: str) -> bytes:
    lines = [f"--b\r\nContent-Disposition: form-data; {disposition}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data + b"\r\n"


IMAGE = part('name="image"; filename="a.png"', PHOTO, "Content-Type: image/png")


async def send(
    site: Site, *parts: bytes, path: str = API, content_type: str = MULTIPART["Content-Type"]
) -> httpx.Response:
    async with site.client("ann", (*USER_SCOPES, Scope.RUN)) as client:
        return await client.post(
            path, content=b"".join(parts) + END, headers={"Content-Type": content_type}
        )


async def submitted(site: Site, *parts: bytes, path: str = API) -> Job:
    answer = await send(site, *parts, path=path)
    assert answer.status_code == 202, answer.text
    return site.jobs.rows[UUID(answer.json()["id"])]


@pytest.mark.parametrize(
    "image",
    [
        part("name=\"image\"; filename*=UTF-8''%C3%BC.png", PHOTO),
        part("name=image; filename=a.png", PHOTO),
        part('filename="a.png"; name="image"', PHOTO),
        part('NAME="image"; Filename="a.png"', PHOTO),
        part('name="image"; filename=""', PHOTO),
        part('name="image"; filename="a;b\\"c.png"', PHOTO),
        part('name="image"', PHOTO, "Content-Type: image/jpg"),
        part('name="image"', PHOTO, "Content-Type: application/octet-stream"),
        part('name="image"; filename="a"', PHOTO, "Content-Transfer-Encoding: binary"),
        part('name="image"; filename="a"', PHOTO, "Content-Type: text/plain; charset=x-unknown"),
        part('name="image"; filename=""', b"") + IMAGE,
    ],
    ids=[
        "extended name alone",
        "no quotes",
        "name last",
        "capitals",
        "no file name",
        "escaped quote",
        "type alone",
        "octets",
        "binary encoding",
        "a type that is not so",
        "an input without a file",
    ],
)
async def test_a_photo_is_taken_however_its_part_says_so(site: Site, image: bytes) -> None:
    job = await submitted(site, image)
    assert site.blobs.objects[job.input.key] == PHOTO


@pytest.mark.parametrize(
    "boundary",
    [
        "b",
        '"b"',
        "b; charset=utf-8",
        'b; charset="UTF-8"',
        " b ",
        "b;",
        "x; boundary*=undefined''b",
    ],
)
async def test_the_boundary_may_stand_among_other_parameters(site: Site, boundary: str) -> None:
    answer = await send(site, IMAGE, content_type=f"Multipart/Form-Data; boundary={boundary}")
    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize(
    "headers",
    [
        ['name="params"; filename="params.json"', "Content-Type: application/json"],
        ["name=\"params\"; filename*=UTF-8''p.json"],
        ['name="params"', "Content-Type: application/json; charset=utf-8"],
        ['name="params"', "Content-Type: text/plain; charset=ISO-8859-1"],
        ['name="params"', "Content-Type: text/plain; charset=US-ASCII"],
        ['name="params"', "Content-Type: application/octet-stream"],
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [b'{"strength": 0.5}', BOM + b' {"strength": 0.5}\r\n'], ids=repr)
async def test_params_may_be_a_file_with_a_byte_order_mark(
    site: Site, headers: list[str], text: bytes
) -> None:
    job = await submitted(site, part(headers[0], text, *headers[1:]), IMAGE)
    assert job.params["strength"] == 0.5


@pytest.mark.parametrize("text", [b"", BOM])
async def test_a_graph_may_be_a_file(site: Site, text: bytes) -> None:
    """`curl -F graph=@graph.json` sends it like this, also from a Windows editor."""
    sent = text + json.dumps(graph(scale(2))).encode()
    job = await submitted(site, part('name="graph"; filename="g.json"', sent), IMAGE, path=RUNS)
    assert job.workflow == "custom"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("keep_metadata", b"on", True),
        ("keep_metadata", b"1", True),
        ("keep_metadata", b"True", True),
        ("keep_metadata", b" yes\n", True),
        ("keep_metadata", b"off", False),
        ("keep_metadata", b"", False),
        ("output_format", b"WEBP", OutputFormat.WEBP),
        ("output_format", b"jpg", OutputFormat.JPEG),
        ("output_format", b"", OutputFormat.PNG),
        ("priority", b"Batch", Priority.BATCH),
        ("run_limit_s", b" 30 ", 30.0),
        ("run_limit_s", b"3e1", 30.0),
        ("run_limit_s", b"", None),
        ("webhook_url", b"", None),
        ("workflow", b"enlarge\n", "enlarge"),
        ("workflow", BOM + b"enlarge", "enlarge"),
    ],
)
async def test_a_field_is_taken_as_tools_write_its_value(
    site: Site, name: str, text: bytes, value: object
) -> None:
    """White space, capitals and byte order marks are ignored; an empty field is left out."""
    job = await submitted(site, part(f'name="{name}"', text), IMAGE)
    assert getattr(job.options if hasattr(job.options, name) else job, name) == value


@pytest.mark.parametrize("path", [API, BATCHES])
@pytest.mark.parametrize(
    ("parts", "field", "why"),
    [
        ([part('name="params"', b"{}") * 2], "params", "more than once"),
        ([part('name="parameters"', b"{}")], "parameters", "no such field; its fields are image,"),
        (
            [part('name="file"; filename="a.png"', PHOTO)],
            "file",
            "no such field; its fields are image,",
        ),
        ([part('name="params"', b" " * 65_537)], "params", "longer than 65536 bytes"),
        ([part('name="params"', b"{")], "params", "Invalid JSON"),
        ([part('name="params"', b"[1]")], "params", "must be a JSON object"),
        ([part('name="workflow"', b"\xff")], "workflow", "UTF-8"),
        (
            [part('name="workflow"', b"restore", "Content-Type: text/plain; charset=utf-16")],
            "workflow",
            "UTF-8, not utf-16",
        ),
        (
            [part('name="image"; filename="a"', b"aGk=", "Content-Transfer-Encoding: base64")],
            "image",
            "not base64",
        ),
        ([part('name="image"', b"/9j/4AAQ")], "image", "as a file"),
        ([part('filename="a.png"', PHOTO)], "form", "a field name"),
        ([part('name="keep_metadata"', b"perhaps")], "keep_metadata", "boolean"),
    ],
    ids=[
        "twice",
        "unknown",
        "unknown file",
        "long",
        "cut",
        "list",
        "latin",
        "utf-16",
        "base64",
        "photo as text",
        "no name",
        "no boolean",
    ],
)
async def test_a_refused_form_names_the_field(
    site: Site, path: str, parts: list[bytes], field: str, why: str
) -> None:
    answer = await send(site, *parts, IMAGE, path=path)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "malformed_request"), answer.text
    assert why in problem["details"]["problems"][f"form.{field}"]
    assert (site.jobs.rows, site.blobs.objects) == ({}, {})


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([IMAGE, IMAGE], "one photo"),
        ([IMAGE, part('name="upload_id"', b"3b1f9d4e-0000-4000-8000-000000000000")], "upload_id"),
        ([part('name="workflow"', b"restore")], "upload_id"),
        ([part('name="image"; filename=""', b"")], "upload_id"),
    ],
    ids=["two photos", "a photo and an upload", "neither", "an input without a file"],
)
async def test_a_restoration_is_of_one_photo(site: Site, parts: list[bytes], why: str) -> None:
    answer = await send(site, *parts)
    assert answer.status_code == 422
    assert why in answer.json()["details"]["problems"]["form.image"]


@pytest.mark.parametrize("path", [API, BATCHES, RUNS])
@pytest.mark.parametrize(
    ("content_type", "status", "why"),
    [
        ("application/json", 415, "multipart/form-data"),
        ("application/x-www-form-urlencoded", 415, "not application/x-www-form-urlencoded"),
        ("multipart/mixed; boundary=b", 415, "not multipart/mixed"),
        ("", 415, "multipart/form-data"),
        ("multipart/form-data", 400, "boundary"),
        ('multipart/form-data; boundary=""', 400, "boundary"),
        ("multipart/form-data; boundary=" + "b" * 300, 400, "not valid multipart"),
        ("multipart/form-data; boundary=other", 400, "not valid multipart"),
    ],
)
async def test_a_body_of_another_type_is_told_what_to_be(
    site: Site, path: str, content_type: str, status: int, why: str
) -> None:
    answer = await send(site, IMAGE, path=path, content_type=content_type)
    assert answer.status_code == status, answer.text
    assert why in answer.json()["detail"]


FIELDS = [
    part('name="workflow"', b"enlarge"),
    part('name="params"', b'{"scale": 2}'),
    part('name="output_format"', b"webp"),
]


@pytest.mark.parametrize("order", list(permutations([*FIELDS, IMAGE])))
@pytest.mark.parametrize("path", [API, BATCHES])
async def test_the_parts_of_a_form_may_come_in_any_order(
    site: Site, path: str, order: tuple[bytes, ...]
) -> None:
    answer = await send(site, *order, path=path)
    assert answer.status_code == 202, answer.text
    [job] = site.jobs.rows.values()
    assert (job.workflow, job.params["scale"], job.output_format) == ("enlarge", 2, "webp")
    assert site.blobs.objects[job.input.key] == PHOTO


async def test_fields_may_follow_and_part_the_photos_of_a_batch(site: Site) -> None:
    """They hold for all photos, including those before them."""
    broken = part('name="image"; filename="b.jpg"', BROKEN)
    answer = await send(site, IMAGE, FIELDS[1], broken, FIELDS[0], IMAGE, FIELDS[2], path=BATCHES)
    assert answer.status_code == 202, answer.text
    assert [item["status"] for item in answer.json()["items"]] == ["queued", "refused", "queued"]
    assert {(job.workflow, job.params["scale"]) for job in site.jobs.rows.values()} == {
        ("enlarge", 2)
    }
    assert len(site.blobs.objects) == 2


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([part('name="workflow"', b"nope")], 404),
        ([part('name="params"', b'{"strength": 7}')], 422),
        ([part('name="params"', b"{}") * 2], 422),
        ([part('name="webhook_url"', b"ftp://x")], 422),
    ],
    ids=["workflow", "parameter", "twice", "webhook"],
)
async def test_a_wrong_field_behind_the_photos_leaves_nothing(
    site: Site, fields: list[bytes], status: int
) -> None:
    answer = await send(site, IMAGE, IMAGE, *fields, path=BATCHES)
    assert answer.status_code == status, answer.text
    assert (site.jobs.rows, site.blobs.objects, site.batches.rows) == ({}, {}, {})


async def test_a_batch_wrong_by_its_first_fields_is_refused_before_its_photos(site: Site) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield part('name="workflow"', b"restore") + part('name="params"', b'{"strength": 7}')
        yield IMAGE
        yield IMAGE
        pytest.fail("more was read than the fields and the first photo")

    async with site.client() as client:
        answer = await client.post(BATCHES, content=body(), headers=MULTIPART)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameters")


async def test_a_photo_too_large_for_the_workflow_is_refused_by_itself(site: Site) -> None:
    """This holds if the workflow is named after it; none of it stays stored."""
    wide = part('name="image"; filename="wide.png"', photo((16_000, 1)))
    webp = part('name="output_format"', b"webp")
    answer = await send(site, wide, IMAGE, *FIELDS[:2], webp, path=BATCHES)
    first, second = answer.json()["items"]
    assert (first["status"], first["failure"]["code"]) == ("refused", "image_too_large")
    assert second["status"] == "queued"
    assert len(site.blobs.objects) == 1


async def test_reuse_holds_for_photos_in_front_of_its_field(site: Site) -> None:
    """With `reuse=never` after the photos, no earlier result is used for them."""
    job = await submitted(site, part('name="priority"', b"batch"), IMAGE)
    await site.succeed(await site.start(job.id))
    never = part('name="reuse"', Reuse.NEVER.value.encode())
    again = (await send(site, IMAGE, path=BATCHES)).json()
    anew = (await send(site, IMAGE, never, path=BATCHES)).json()
    assert (again["status"], anew["status"]) == ("succeeded", "running")


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('filename="say %22hi%22.jpg"', 'say "hi".jpg'),
        ('filename="say \\"hi\\".jpg"', 'say "hi".jpg'),
        ("filename*=UTF-8''say%20%22hi%22.jpg", 'say "hi".jpg'),
        ("filename=\"x.jpg\"; filename*=UTF-8''100%2522.jpg", "100%22.jpg"),
        ("filename*=UTF-8''100%2522.jpg; filename=\"x.jpg\"", "100%22.jpg"),
        ("filename*=iso-8859-1'en'%A3.jpg", "£.jpg"),
        ("filename*=punycode''a-b.jpg", "a-b.jpg"),
        ('filename="100%.jpg"', "100%.jpg"),
        ('filename="ü 写真.jpg"', "ü 写真.jpg"),
        ('filename="a/b\\c;d=e.jpg"', "a/b\\c;d=e.jpg"),
        ("filename=<a>.jpg", "<a>.jpg"),
    ],
    ids=str,
)
async def test_a_file_name_comes_back_as_it_was(site: Site, disposition: str, name: str) -> None:
    """The notations are those of browsers, curl, Python's libraries, and RFC 5987."""
    answer = await send(site, part(f'name="image"; {disposition}', PHOTO), path=BATCHES)
    assert answer.json()["items"][0]["name"] == name


def test_each_option_of_a_job_has_a_field_and_a_column() -> None:
    """The form, the row and `JobOptions` name an option alike."""
    names = {option.name for option in fields(JobOptions)}
    assert names <= JobForm.model_fields.keys()
    assert names <= set(jobs.columns.keys())
