"""Requests for another owner's objects send Postgres the same queries as for missing ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, event

from actors.submission.service import Submission
from persistence.postgres.batches import PostgresBatchStore
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from serve_app.services import Services
from tests.fakes.images import ImagesHere
from tests.fakes.site import Site, open_site, photo
from tests.support.foreign import OWNED, assert_as_if_missing, routes_to_owned


@pytest.fixture
async def site(database_url: str) -> AsyncIterator[Site]:
    """Run a site whose jobs and batches are in Postgres."""
    async with open_site() as site:
        database = Database(database_url, pool_size=1)
        jobs = PostgresJobStore(database)
        services = replace(
            site.services,
            jobs=jobs,
            batches=PostgresBatchStore(database),
            submission=_on(jobs, site.services),
        )
        try:
            yield replace(site, services=services)
        finally:
            await database.aclose()


def _on(jobs: PostgresJobStore, services: Services) -> Submission:
    limits = services.settings.upload_limits
    return Submission(services.catalog, jobs, services.blobs, ImagesHere(limits), limits)


@contextmanager
def _statements() -> Iterator[list[str]]:
    """Yield a list of the statements sent to Postgres during the block."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)


async def _anns(site: Site) -> dict[str, UUID]:
    async with site.client("ann") as ann:
        answer = await ann.post("/api/v1/batches", files=[("image", ("a.png", photo()))])
        batch = answer.json()
    return {"batch_id": UUID(batch["id"]), "job_id": UUID(batch["items"][0]["job_id"])}


@pytest.mark.tenants
async def test_the_same_queries_for_foreign_and_for_missing(site: Site) -> None:
    """On every route the owner is part of each query. A row read first and compared with its owner
    later would take a different time."""
    anns = await _anns(site)
    assert anns.keys() == OWNED
    async with site.client("bob") as bob:
        routes = routes_to_owned((await bob.get("/openapi.json")).json())
        for route in routes:
            foreign_id, missing_id = anns[route.parameter], uuid4()
            with _statements() as for_foreign:
                foreign = await bob.request(route.method, route.to(foreign_id))
            with _statements() as for_missing:
                missing = await bob.request(route.method, route.to(missing_id))
            assert_as_if_missing(foreign, missing, foreign_id, missing_id)
            assert for_foreign == for_missing != [], route
            assert "owner = " in for_foreign[0], route
