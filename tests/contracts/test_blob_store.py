"""The rules of the BlobStore port on the tests' S3."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import httpx
import pytest

from persistence.objects.redis_cache import CopiedBlobs, RedisCopies
from persistence.objects.s3 import S3BlobStore
from restoration.errors import ArtifactCorrupt, DependencyUnavailable
from restoration.jobs import Artifact
from restoration.ports.objects import BlobStore

DATA = bytes(range(256)) * 20


def _store(s3: Any, **changes: Any) -> S3BlobStore:
    arguments = {
        "bucket": s3.bucket,
        "endpoint_url": s3.endpoint_url,
        "access_key": s3.access_key,
        "secret_key": s3.secret_key,
    }
    return S3BlobStore(**arguments | changes)


@pytest.fixture
async def s3_store(s3: Any) -> AsyncIterator[S3BlobStore]:
    store = _store(s3)
    yield store
    await store.aclose()


@pytest.fixture(params=["alone", "with copies"])
async def store(
    request: pytest.FixtureRequest, s3_store: S3BlobStore, patience: None
) -> AsyncIterator[BlobStore]:
    """Return the S3 store alone, or with copies in Redis as the service uses it."""
    if request.param == "alone":
        yield s3_store
        return
    copies = RedisCopies(request.getfixturevalue("redis_url"))
    yield CopiedBlobs(s3_store, copies)
    await copies.aclose()


@pytest.fixture
def key() -> str:
    return f"outputs/{uuid4()}/1.png"


async def test_what_was_put_is_what_is_got(store: BlobStore, key: str) -> None:
    """The bytes come back unchanged, and the artifact describes them."""
    artifact = await store.put(key, DATA, "image/png")
    assert (artifact.key, artifact.size_bytes) == (key, len(DATA))
    assert artifact.content_type == "image/png"
    assert await store.get(artifact) == DATA


async def test_many_at_once(store: BlobStore, key: str) -> None:
    """Concurrent calls, more of them than threads, do not mix their objects up."""
    keys = [f"{key}-{n}" for n in range(20)]
    artifacts = await asyncio.gather(*(store.put(k, k.encode(), "text/plain") for k in keys))
    found = await asyncio.gather(*(store.get(artifact) for artifact in artifacts))
    assert found == [k.encode() for k in keys]


@pytest.mark.parametrize("other", [b"x" * len(DATA), DATA + b"x", b""])
async def test_an_object_that_was_overwritten_is_corrupt(
    store: BlobStore, key: str, other: bytes
) -> None:
    """Other bytes under the same key are detected, whether or not their length is the same."""
    artifact = await store.put(key, DATA, "image/png")
    await store.put(key, other, "image/png")
    with pytest.raises(ArtifactCorrupt):
        await store.get(artifact)


async def test_an_object_that_is_gone_is_corrupt(store: BlobStore, key: str) -> None:
    """A missing object is a permanent error; deleting it twice is no error."""
    artifact = await store.put(key, DATA, "image/png")
    await store.delete(key)
    await store.delete(key)
    with pytest.raises(ArtifactCorrupt):
        await store.get(artifact)


async def test_any_part_can_be_read_by_itself(store: BlobStore, key: str) -> None:
    artifact = await store.put(key, DATA, "image/png")
    for start, end in ((0, 1), (7, 300), (len(DATA) - 1, len(DATA)), (0, len(DATA))):
        assert await store.read(artifact, start, end) == DATA[start:end]


@pytest.mark.parametrize("other", [DATA + b"x", DATA[:-1], b""])
async def test_a_part_of_an_object_of_another_size_is_corrupt(
    store: BlobStore, key: str, other: bytes
) -> None:
    artifact = await store.put(key, DATA, "image/png")
    await store.put(key, other, "image/png")
    for start, end in ((0, 10), (len(DATA) - 1, len(DATA))):
        with pytest.raises(ArtifactCorrupt):
            await store.read(artifact, start, end)


async def test_a_part_of_an_object_that_is_gone_is_corrupt(store: BlobStore, key: str) -> None:
    artifact = await store.put(key, DATA, "image/png")
    await store.delete(key)
    with pytest.raises(ArtifactCorrupt):
        await store.read(artifact, 0, 10)


async def test_a_signed_url_needs_no_credentials(store: BlobStore, key: str) -> None:
    """Anyone with the URL gets the bytes, with their type and a file name."""
    artifact = await store.put(key, DATA, "image/png")
    url = await store.signed_url(artifact, 'a "new" grüße.png', lifetime_s=60)
    async with httpx.AsyncClient() as client:
        answer = await client.get(url)
        forged = await client.get(url.replace("X-Amz-Expires=60", "X-Amz-Expires=6000"))
    assert answer.status_code == 200
    assert answer.content == DATA
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == (
        'attachment; filename="a _new_ gr__e.png"; '
        "filename*=UTF-8''a%20%22new%22%20gr%C3%BC%C3%9Fe.png"
    )
    assert forged.status_code == 403


async def test_a_signed_url_lapses(store: BlobStore, key: str) -> None:
    """The URL stops working after its lifetime."""
    artifact = await store.put(key, DATA, "image/png")
    url = await store.signed_url(artifact, "a.png", lifetime_s=1)
    async with httpx.AsyncClient() as client, asyncio.timeout(300):
        while (await client.get(url)).status_code == 200:  # noqa: ASYNC110 - the server's clock
            await asyncio.sleep(0.2)


async def test_ping_asks_for_the_bucket(s3: Any, s3_store: S3BlobStore) -> None:
    """A missing bucket is DependencyUnavailable."""
    await s3_store.ping()
    missing = _store(s3, bucket=f"missing-{uuid4()}")
    with pytest.raises(DependencyUnavailable):
        await missing.ping()
    await missing.aclose()


async def test_wrong_credentials(s3: Any, key: str) -> None:
    """Refused credentials are DependencyUnavailable, not a missing object, so that no job fails."""
    store = _store(s3, secret_key="wrong")
    with pytest.raises(DependencyUnavailable):
        await store.get(Artifact(key, "0" * 64, 1, "image/png"))
    await store.aclose()


async def test_a_server_that_is_away(s3: Any, key: str) -> None:
    """A refused connection is DependencyUnavailable for every method."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        store = _store(s3, endpoint_url=f"http://127.0.0.1:{unused.getsockname()[1]}")
        artifact = Artifact(key, "0" * 64, 1, "image/png")
        for call in (
            store.put(key, DATA, "image/png"),
            store.get(artifact),
            store.delete(key),
            store.ping(),
        ):
            with pytest.raises(DependencyUnavailable) as caught:
                await call
            assert caught.value.__cause__ is not None
        await store.aclose()


async def test_a_wrong_size_is_found_before_the_bytes_are_read(store: BlobStore, key: str) -> None:
    """A wrong size or a wrong sha256 in the row is enough to refuse the object."""
    artifact = await store.put(key, DATA, "image/png")
    for wrong in (replace(artifact, size_bytes=1), replace(artifact, sha256="0" * 64)):
        with pytest.raises(ArtifactCorrupt):
            await store.get(wrong)
