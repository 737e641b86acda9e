"""Results on the running service are private, and are saved rather than shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest

from tests.fakes.site import API
from tests.support.pictures import file, noise
from tests.support.stack import Stack

pytestmark = pytest.mark.real_engine


@dataclass(frozen=True)
class Delivered:
    """A finished job, with the path of its result and a signed link."""

    id: str
    path: str
    link: str


@pytest.fixture(scope="module")
def delivered(stack: Stack) -> Delivered:
    with stack.http("photographer") as http:
        job = http.post(
            API,
            files={"image": ("a.png", file(noise(), "PNG"))},
            data={"workflow": "enlarge"},
            headers={"Prefer": "wait=50"},
        ).json()
        redirect = http.get(job["links"]["result"])
    assert (redirect.status_code, redirect.headers["cache-control"]) == (307, "no-store")
    return Delivered(job["id"], job["links"]["result"], redirect.headers["location"])


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=300, trust_env=False)


@pytest.mark.results
def test_a_link_delivers_an_attachment(delivered: Delivered) -> None:
    """The signature fixes the type and the file name, regardless of the browser's request."""
    answer = get(delivered.link)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    wanted = f'attachment; filename="restored-{delivered.id}.png"'
    assert answer.headers["content-disposition"].startswith(wanted)


@pytest.mark.results
def test_what_the_service_delivers_is_an_attachment(stack: Stack, delivered: Delivered) -> None:
    """The answer also forbids sniffing and shared caches."""
    with stack.http("photographer") as http:
        answer = http.get(delivered.path, params={"download": 1})
    assert answer.headers["content-disposition"] == (
        f'attachment; filename="restored-{delivered.id}.png"'
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private"
    assert answer.headers["content-type"] == "image/png"


def test_a_download_is_to_be_had_in_ranges(stack: Stack, delivered: Delivered) -> None:
    """The ranges together are the whole file, whose sha256 is its ETag."""
    with stack.http("photographer") as http:
        whole = http.get(delivered.path, params={"download": 1})
        half = len(whole.content) // 2
        condition = {"If-Range": whole.headers["etag"]}
        parts = [
            http.get(
                delivered.path,
                params={"download": 1},
                headers={**condition, "Range": f"bytes={asked}"},
            )
            for asked in (f"0-{half - 1}", f"{half}-")
        ]
        behind = http.get(
            delivered.path,
            params={"download": 1},
            headers={"Range": f"bytes={len(whole.content)}-"},
        )
    assert [part.status_code for part in parts] == [206, 206]
    assert b"".join(part.content for part in parts) == whole.content
    assert whole.headers["etag"] == f'"{hashlib.sha256(whole.content).hexdigest()}"'
    assert behind.status_code == 416
    assert behind.headers["content-range"] == f"bytes */{len(whole.content)}"


def test_a_head_has_the_headers_of_the_download(stack: Stack, delivered: Delivered) -> None:
    with stack.http("photographer") as http:
        got = http.get(delivered.path, params={"download": 1})
        head = http.head(delivered.path, params={"download": 1})
        events = http.head(delivered.path.replace("/result", "/events"))
    assert (head.status_code, head.content, events.status_code) == (200, b"", 200)
    for name in ("content-length", "content-type", "etag", "accept-ranges", "content-disposition"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.results
def test_the_bucket_is_private(delivered: Delivered) -> None:
    """Without a signature the object can be neither read nor written, and the bucket not listed."""
    parts = urlsplit(delivered.link)
    bucket = "/" + parts.path.split("/")[1]
    plain = urlunsplit(parts._replace(query=""))
    assert get(plain).status_code == 403
    for path in (bucket, f"{bucket}/", "/"):
        answer = get(urlunsplit(parts._replace(path=path, query="")))
        assert answer.status_code == 403, answer.text
    assert httpx.put(plain, content=b"x", trust_env=False).status_code == 403
    assert httpx.delete(plain, trust_env=False).status_code == 403


@pytest.mark.results
def test_a_link_is_for_one_object_and_a_while(delivered: Delivered) -> None:
    """The key, the end, the name and the type of a link cannot be changed."""
    assert get(delivered.link.replace("/1.png", "/2.png")).status_code == 403
    assert get(delivered.link.replace("X-Amz-Expires=3600", "X-Amz-Expires=9")).status_code == 403
    earlier = delivered.link.replace("X-Amz-Date=20", "X-Amz-Date=19")
    assert get(earlier).status_code == 403
    for name in ("response-content-disposition", "response-content-type"):
        assert name in delivered.link
        changed = delivered.link.replace(f"{name}=", f"{name}=text%2Fhtml")
        assert get(changed).status_code == 403
    assert httpx.put(delivered.link, content=b"x", trust_env=False).status_code == 403


@pytest.mark.results
def test_only_its_owner_is_given_a_link(stack: Stack, delivered: Delivered) -> None:
    """Another owner gets the 404 of a missing job, in both ways."""
    with stack.http("stranger") as stranger:
        for params in ({}, {"download": 1}):
            assert stranger.get(delivered.path, params=params).status_code == 404
    assert get(f"{stack.record.url}{delivered.path}").status_code == 401
