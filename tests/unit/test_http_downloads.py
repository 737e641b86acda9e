"""A result by `download=1`: sent in parts at the client's pace, in any range."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from uuid import UUID

import httpx
import pytest
from starlette.types import Message

from restoration.tasks import stop
from serve_app.app import build_asgi_app
from serve_app.routes.results import PART_BYTES
from tests.fakes.site import API, Site

SMALL = bytes(range(250)) * 4
LARGE = b"".join(n.to_bytes(4, "big") for n in range(3 * PART_BYTES // 4 + 250))


@pytest.fixture
async def client(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with site.client() as client:
        yield client


async def result(site: Site, data: bytes) -> tuple[str, str]:
    """Return the path of a job's result with these bytes, and its key."""
    job_id: UUID = await site.submit()
    output = await site.succeed(await site.start(job_id), data)
    return f"{API}/{job_id}/result?download=1", output.key


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one part", "many parts"])
async def test_the_whole_is_what_was_stored(
    site: Site, client: httpx.AsyncClient, data: bytes
) -> None:
    path, _ = await result(site, data)
    answer = await client.get(path)
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["content-length"] == str(len(data))
    assert answer.headers["accept-ranges"] == "bytes"
    sha256 = hashlib.sha256(data)
    assert answer.headers["etag"] == f'"{sha256.hexdigest()}"'
    digest = base64.b64encode(sha256.digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"


SIZE = len(LARGE)


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("Bytes=10-19", 10, 20),
        (f"bytes={PART_BYTES - 1}-{PART_BYTES}", PART_BYTES - 1, PART_BYTES + 1),
        ("bytes=5-", 5, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=-{10 * SIZE}", 0, SIZE),
        (f"bytes={SIZE - 1}-{10 * SIZE}", SIZE - 1, SIZE),
        (f"bytes=0-{'9' * 18}", 0, SIZE),
    ],
)
async def test_one_range_is_answered_with_its_bytes(
    site: Site, client: httpx.AsyncClient, asked: str, first: int, end: int
) -> None:
    path, _ = await result(site, LARGE)
    answer = await client.get(path, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, LARGE[first:end])
    assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(end - first)


async def test_a_range_of_a_small_result_is_answered_too(
    site: Site, client: httpx.AsyncClient
) -> None:
    path, _ = await result(site, SMALL)
    answer = await client.get(path, headers={"Range": "bytes=3-9"})
    assert (answer.status_code, answer.content) == (206, SMALL[3:10])


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=0-1, 5-6",
        "bytes=9-3",
        "bytes=-",
        "bytes=a-b",
        "bytes=\N{ARABIC-INDIC DIGIT ONE}-".encode().decode("latin-1"),
        f"bytes={'9' * 5000}-",
        "pages=1-2",
        "bytes 1-2",
        "",
    ],
)
async def test_what_is_no_single_range_is_answered_with_the_whole(
    site: Site, client: httpx.AsyncClient, asked: str
) -> None:
    path, _ = await result(site, SMALL)
    answer = await client.get(path, headers=[(b"Range", asked.encode("latin-1"))])
    assert (answer.status_code, answer.content) == (200, SMALL)
    assert "content-range" not in answer.headers


async def test_two_range_headers_are_answered_with_the_whole(
    site: Site, client: httpx.AsyncClient
) -> None:
    path, _ = await result(site, SMALL)
    answer = await client.get(path, headers=[("Range", "bytes=0-1"), ("Range", "bytes=2-3")])
    assert (answer.status_code, answer.content) == (200, SMALL)


@pytest.mark.parametrize("asked", [f"bytes={len(SMALL)}-", "bytes=-0", f"bytes={'9' * 18}-"])
async def test_a_range_behind_the_end_is_a_416(
    site: Site, client: httpx.AsyncClient, asked: str
) -> None:
    path, _ = await result(site, SMALL)
    answer = await client.get(path, headers={"Range": asked})
    assert answer.status_code == 416
    assert answer.json()["code"] == "requested_range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{len(SMALL)}"


@pytest.mark.parametrize(
    ("condition", "status"),
    [('"{etag}"', 206), ('W/"{etag}"', 200), ('"other"', 200), ("{date}", 200)],
)
async def test_if_range_compares_the_etag(
    site: Site, client: httpx.AsyncClient, condition: str, status: int
) -> None:
    path, _ = await result(site, SMALL)
    etag, date = hashlib.sha256(SMALL).hexdigest(), "Wed, 21 Oct 2015 07:28:00 GMT"
    headers = {"Range": "bytes=0-1", "If-Range": condition.format(etag=etag, date=date)}
    answer = await client.get(path, headers=headers)
    assert answer.status_code == status
    assert answer.content == (SMALL[:2] if status == 206 else SMALL)


async def test_a_redirect_knows_no_range(site: Site, client: httpx.AsyncClient) -> None:
    path, _ = await result(site, SMALL)
    answer = await client.get(path.partition("?")[0], headers={"Range": "bytes=0-1"})
    assert answer.status_code == 307


async def test_a_download_that_is_resumed_by_range_reads_only_the_rest(
    site: Site, client: httpx.AsyncClient
) -> None:
    path, _ = await result(site, LARGE)
    begun = LARGE[: 2 * PART_BYTES]
    answer = await client.get(path, headers={"Range": f"bytes={len(begun)}-"})
    assert begun + answer.content == LARGE
    assert min(start for start, _ in site.blobs.reads) == len(begun)


async def test_a_client_that_does_not_read_has_one_part_more_read_for_it(site: Site) -> None:
    path, _ = await result(site, LARGE)
    begun = asyncio.Event()

    async def receive() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            begun.set()
            await asyncio.Future()

    scope = {
        **{
            "type": "http",
            "method": "GET",
            "path": path.partition("?")[0],
            "query_string": b"download=1",
        },
        "headers": [(b"authorization", f"Bearer {site.token()}".encode())],
    }
    answering = asyncio.ensure_future(build_asgi_app(site.services)(scope, receive, send))
    async with asyncio.timeout(10):
        await begun.wait()
    assert site.blobs.reads == [(0, PART_BYTES)]
    await stop(answering)


async def test_a_damaged_result_of_many_parts_breaks_off_before_its_end(
    site: Site, client: httpx.AsyncClient
) -> None:
    """Its Content-Length shows this to every client."""
    path, key = await result(site, LARGE)
    site.blobs.objects[key] = b"x" + LARGE[1:]
    answer = await client.get(path)
    assert len(answer.content) == 3 * PART_BYTES < int(answer.headers["content-length"])


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one part", "many parts"])
async def test_a_result_that_is_gone_is_an_error_and_no_picture(
    site: Site, client: httpx.AsyncClient, data: bytes
) -> None:
    path, key = await result(site, data)
    del site.blobs.objects[key]
    answer = await client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_corrupt")


async def test_a_head_of_a_download_reads_nothing(site: Site, client: httpx.AsyncClient) -> None:
    path, _ = await result(site, LARGE)
    site.blobs.down = True
    answer = await client.head(path, headers={"Range": "bytes=0-1"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(LARGE))
    assert site.blobs.reads == []
