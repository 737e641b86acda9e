"""An owner with everything that it may have at the same time, and what another gets beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from unittest.mock import patch
from uuid import UUID

import pytest

from restoration.fair_queue import Owner, current_owner
from restoration.jobs import Artifact, Job
from tests.fakes.site import Site, open_site

DEADLINE_S = 30


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site() as site:
        yield site


async def test_the_calls_of_a_request_are_made_in_its_owners_turn(site: Site) -> None:
    seen: list[Owner] = []
    put = site.blobs.put

    async def spied(key: str, data: bytes, content_type: str) -> Artifact:
        seen.append(current_owner.get())
        return await put(key, data, content_type)

    with patch.object(site.blobs, "put", spied):
        await site.submit("ann")
        await site.submit("bob")
    assert seen == ["ann", "bob"]


async def test_the_poll_that_all_watchers_share_takes_no_owners_turn(site: Site) -> None:
    seen: list[Owner] = []
    find, polled = site.jobs.find, asyncio.Event()

    async def spied(job_ids: Sequence[UUID]) -> Sequence[Job]:
        seen.append(current_owner.get())
        polled.set()
        return await find(job_ids)

    job = await site.jobs.get(await site.submit("ann"))
    current_owner.set("ann")
    with patch.object(site.jobs, "find", spied):
        async with asyncio.timeout(DEADLINE_S), aclosing(site.services.watcher.watch(job)) as watch:
            await anext(watch)
            await anext(watch)
            await polled.wait()
    assert set(seen) == {None}
