"""Hostile uploads to the running service, in the form and directly to S3."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from PIL import Image
from PIL.ExifTags import GPS, IFD, Base

from restoration.images import UploadLimits
from restoration.jobs import JobStatus, OutputFormat
from serve_app.client import RestorationClient
from tests.fakes.site import API
from tests.support.pictures import chunk, file, noise
from tests.support.stack import Stack
from tests.support.stack_processes import Process, every_process, of_stack

pytestmark = pytest.mark.real_engine
UPLOADS = "/api/v1/uploads"
LIMIT = UploadLimits().max_bytes
LATITUDE = (51.0, 16.0, 30.5)


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.http("uploader") as http:
        yield http


@pytest.fixture
def client(stack: Stack) -> Iterator[RestorationClient]:
    with stack.client("uploader") as client:
        yield client


def send(http: httpx.Client, image: bytes, **fields: str) -> httpx.Response:
    return http.post(API, files={"image": ("a", image)}, data={"workflow": "enlarge", **fields})


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def with_exif() -> bytes:
    """Return a small photo with time, place and camera in its EXIF."""
    exif = Image.Exif()
    exif[Base.Make], exif[Base.Orientation] = "ACME", 6
    exif.get_ifd(IFD.Exif)[Base.DateTimeOriginal] = "1986:04:26 01:23:40"
    exif.get_ifd(IFD.GPSInfo).update({GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: LATITUDE})
    return file(noise(), "JPEG", exif=exif.tobytes())


@pytest.mark.uploads
def test_a_body_that_says_it_is_too_large_is_not_read(http: httpx.Client) -> None:
    """The answer is 413 by Content-Length, before the body has been read."""
    head = {"Content-Type": "multipart/form-data; boundary=b"}
    body = b"--b\r\n" + bytes(LIMIT + 2 * 2**20)
    assert refusal(http.post(API, content=body, headers=head)) == (413, "image_too_large")


@pytest.mark.uploads
def test_a_body_without_a_length_is_counted(http: httpx.Client) -> None:
    """A body without a length is refused at the limit, while it arrives."""

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(LIMIT // 2**20 + 2):
            yield bytes(2**20)

    head = {"Content-Type": "multipart/form-data; boundary=b"}
    assert refusal(http.post(API, content=endless(), headers=head)) == (413, "image_too_large")


@pytest.mark.uploads
def test_a_decompression_bomb_is_not_decoded(http: httpx.Client) -> None:
    """A picture of 10 kB that claims a hundred million pixels, or more than Pillow opens, is
    refused."""
    for side in (10_000, 60_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        bomb = b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
        assert refusal(send(http, bomb)) == (413, "image_too_large")


def image_processes(stack: Stack) -> list[Process]:
    owners = {each.pid for each in of_stack(stack.state_dir)}
    return [
        each
        for each in every_process()
        if each.parent in owners and "actors.images.process" in each.command
    ]


@pytest.mark.uploads
def test_uploads_are_decoded_apart(stack: Stack, http: httpx.Client) -> None:
    """Pictures are decoded in processes without secrets, whose death fails no later upload."""
    assert refusal(send(http, file(noise(), "JPEG")[:500])) == (422, "broken_image")
    found = image_processes(stack)
    assert found
    for each in found:
        names = {
            line.partition(b"=")[0]
            for line in Path(f"/proc/{each.pid}/environ").read_bytes().split(b"\0")
        }
        assert names == {
            b"PATH",
            b"PYTHONPATH",
            b"OPENBLAS_NUM_THREADS",
            b"MALLOC_MMAP_THRESHOLD_",
            b"",
        }
        each.kill()
    assert send(http, file(noise(), "PNG")).status_code == 202
    assert not set(image_processes(stack)).intersection(found)


@pytest.mark.uploads
@pytest.mark.parametrize("wanted", OutputFormat)
def test_a_result_does_not_tell_where_the_photo_was_taken(
    client: RestorationClient, wanted: OutputFormat, tmp_path: Path
) -> None:
    """The result has no EXIF, text or comment, neither of the photo nor of the engine."""
    job = client.wait(client.submit(with_exif(), workflow="enlarge", output_format=wanted).id)
    assert job.status is JobStatus.SUCCEEDED, job.failure
    client.download(job.id, tmp_path / "result")
    with Image.open(tmp_path / "result") as image:
        image.load()
        assert len(image.getexif()) == 0
        jfif = {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        in_every_webp = {"loop", "background", "timestamp", "duration"}
        assert image.info.keys() <= jfif | in_every_webp
    assert b"ACME" not in (tmp_path / "result").read_bytes()


@pytest.mark.uploads
def test_metadata_is_kept_for_who_asks(client: RestorationClient, tmp_path: Path) -> None:
    """Place, time and camera are kept, the picture is upright, and the orientation is removed."""
    sent = client.submit(with_exif(), workflow="enlarge", keep_metadata=True)
    client.wait(sent.id)
    job = client.download(sent.id, tmp_path / "result.png")
    assert job.keep_metadata
    with Image.open(tmp_path / "result.png") as image:
        assert image.size == (48 * 4, 64 * 4)  # was rotated by 90 degrees
        exif = image.getexif()
    assert exif.get_ifd(IFD.GPSInfo)[GPS.GPSLatitude] == LATITUDE
    assert exif.get_ifd(IFD.Exif)[Base.DateTimeOriginal] == "1986:04:26 01:23:40"
    assert Base.Orientation not in exif


# --- past the service


def begin(http: httpx.Client, size_bytes: int, **more: object) -> dict[str, Any]:
    asked = {"content_type": "image/png", "size_bytes": size_bytes, **more}
    answer = http.post(UPLOADS, json=asked)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def put(upload: dict[str, Any], data: bytes, **headers: str) -> int:
    sent = upload["headers"] | headers
    return httpx.put(upload["url"], content=data, headers=sent, trust_env=False).status_code


def use(http: httpx.Client, upload_id: str, **fields: str) -> httpx.Response:
    parts = {"workflow": "enlarge", **fields, "upload_id": upload_id}
    return http.post(API, files={name: (None, text.encode()) for name, text in parts.items()})


@pytest.mark.uploads
def test_a_photo_goes_past_the_service_and_is_restored(
    client: RestorationClient, tmp_path: Path
) -> None:
    """A photo sent to S3 by a link, and submitted by its id, is restored like any other."""
    job = client.wait(client.submit(client.upload(file(noise(), "PNG")), workflow="enlarge").id)
    assert job.status is JobStatus.SUCCEEDED, job.failure
    client.download(job.id, tmp_path / "result.png")
    with Image.open(io.BytesIO((tmp_path / "result.png").read_bytes())) as image:
        assert image.size == (256, 192)


@pytest.mark.uploads
def test_a_link_is_for_what_was_announced(http: httpx.Client) -> None:
    """S3 refuses another type, another length, another key and other rights."""
    data = file(noise(), "PNG")
    upload = begin(http, len(data))
    assert put(upload, data, **{"Content-Type": "text/html"}) == 403
    assert put(upload, data + b"x") == 403
    assert put(upload, data, **{"x-amz-acl": "public-read"}) == 403
    elsewhere = {**upload, "url": upload["url"].replace(upload["id"], str(uuid4()))}
    assert put(elsewhere, data) == 403
    assert use(http, upload["id"]).status_code == 404  # nothing was stored


@pytest.mark.uploads
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GIF89a" + bytes(100), (415, "unsupported_image")),
        (b"<script>alert(1)</script>", (415, "unsupported_image")),
        (file(noise(), "PNG")[:200], (422, "broken_image")),
        (file(Image.new("1", (17_000, 1)), "PNG"), (413, "image_too_large")),
    ],
    ids=["gif", "html", "cut off", "too wide"],
)
def test_what_was_uploaded_is_checked_like_any_other(
    http: httpx.Client, data: bytes, expected: tuple[int, str]
) -> None:
    """A direct upload is checked before a job is recorded, regardless of its announced type."""
    before = http.get(API, params={"limit": 1}).json()
    upload = begin(http, len(data))
    assert put(upload, data) == 200
    assert refusal(use(http, upload["id"])) == expected
    assert http.get(API, params={"limit": 1}).json()["restorations"] == before["restorations"]


@pytest.mark.uploads
def test_an_upload_is_its_owners_and_for_one_job(stack: Stack, http: httpx.Client) -> None:
    """Another owner gets the 404 of a missing id, and a second, different job is refused."""
    data = file(noise(), "PNG")
    upload = begin(http, len(data))
    assert put(upload, data) == 200
    with stack.http("stranger") as stranger:
        theirs, nobodys = (use(stranger, each) for each in (upload["id"], str(uuid4())))
    assert refusal(theirs) == refusal(nobodys) == (404, "upload_not_found")
    assert theirs.json()["detail"] == nobodys.json()["detail"]
    first, again = use(http, upload["id"]), use(http, upload["id"])
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    assert refusal(use(http, upload["id"], workflow="restore")) == (409, "upload_used")
    http.post(first.json()["links"]["cancel"])
