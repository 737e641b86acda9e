"""The rules of the BlobSweeper port, on S3 and in memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from persistence.objects.s3 import S3BlobStore
from tests.fakes.stores import AnyBlobs


@pytest.fixture
def store(any_blobs: AnyBlobs) -> AnyBlobs:
    return any_blobs


@pytest.fixture
def prefix() -> str:
    return f"tests/{uuid4()}/"


async def _listed(store: AnyBlobs, prefix: str, age: timedelta) -> list[str]:
    pages = store.list(prefix, older_than=datetime.now(UTC) - age)
    return [key async for page in pages for key in page]


NOW, AN_HOUR = timedelta(minutes=-1), timedelta(hours=1)  # allows for clocks that differ a little


@pytest.mark.retention
async def test_a_listing_knows_prefix_and_age(store: AnyBlobs, prefix: str) -> None:
    """A listing has every key below the prefix, but none beside it and none that is too young."""
    keys = [f"{prefix}{name}" for name in ("a.png", "b/1.png", "b/2.png", "ü &+%20.png")]
    for key in [*keys, prefix.rstrip("/") + "-beside.png"]:
        await store.put(key, b"x", "image/png")
    assert sorted(await _listed(store, prefix, NOW)) == sorted(keys)
    assert await _listed(store, prefix, AN_HOUR) == []
    assert await _listed(store, f"{prefix}none/", NOW) == []


@pytest.mark.retention
async def test_many_are_deleted_at_once(store: AnyBlobs, prefix: str) -> None:
    """Only the named keys are deleted, and missing ones are no error."""
    keys = [f"{prefix}{name}" for name in ("1.png", "2.png", "ü &+%20.png")]
    for key in keys:
        await store.put(key, b"x", "image/png")
    await store.delete_many([*keys[1:], f"{prefix}never.png"])
    assert await _listed(store, prefix, NOW) == keys[:1]
    await store.delete_many([])
    assert await _listed(store, prefix, NOW) == keys[:1]


@pytest.mark.retention
async def test_a_listing_of_pages_goes_on_while_they_are_deleted(
    blobs: S3BlobStore, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each key is on exactly one page, even if the keys of earlier pages are deleted meanwhile."""
    monkeypatch.setattr("persistence.objects.s3._LISTED_AT_ONCE", 2)
    monkeypatch.setattr("persistence.objects.s3._DELETED_AT_ONCE", 2)
    keys = [f"{prefix}{n}.png" for n in range(5)]
    for key in keys:
        await blobs.put(key, b"x", "image/png")
    seen = []
    async for page in blobs.list(prefix, datetime.now(UTC) - NOW):
        seen.append(list(page))
        await blobs.delete_many(page)
    assert seen == [keys[:2], keys[2:4], keys[4:]]
    await blobs.delete_many(keys)
    assert await _listed(blobs, prefix, NOW) == []
