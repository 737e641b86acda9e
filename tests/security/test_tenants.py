"""Isolation of owners on the running service."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from uuid import UUID, uuid4

import pytest

from serve_app.auth.scopes import Scope
from tests.fakes.site import API, photo, submission
from tests.support.foreign import OWNED, Route, assert_as_if_missing, routes_to_owned
from tests.support.stack import Stack

BATCHES = "/api/v1/batches"
OWNERS = ("tenant-a", "tenant-b", "tenant-c")


@pytest.fixture(scope="module")
def routes(stack: Stack) -> list[Route]:
    with stack.http() as client:
        return routes_to_owned(client.get("/openapi.json").json())


@pytest.fixture(scope="module")
def owned(stack: Stack) -> Mapping[str, Mapping[str, UUID]]:
    """Create one object of each kind for each owner."""
    return {owner: _make(stack, owner) for owner in OWNERS}


def _make(stack: Stack, owner: str) -> dict[str, UUID]:
    with stack.http(owner) as client:
        job = client.post(API, **submission()).json()
        batch = client.post(BATCHES, files=[("image", ("a.png", photo()))]).json()
    return {"job_id": UUID(job["id"]), "batch_id": UUID(batch["id"])}


@pytest.mark.tenants
def test_every_route_with_every_other_owners_identifiers(
    stack: Stack, routes: list[Route], owned: Mapping[str, Mapping[str, UUID]]
) -> None:
    """The answer is the same as for an identifier that does not exist."""
    assert {route.parameter for route in routes} == OWNED == next(iter(owned.values())).keys()
    for owner, caller in itertools.permutations(OWNERS, 2):
        with stack.http(caller) as client:
            for route in routes:
                foreign_id, missing_id = owned[owner][route.parameter], uuid4()
                foreign = client.request(route.method, route.to(foreign_id))
                missing = client.request(route.method, route.to(missing_id))
                assert_as_if_missing(foreign, missing, foreign_id, missing_id)


@pytest.mark.tenants
def test_owners_have_what_is_theirs(stack: Stack, owned: Mapping[str, Mapping[str, UUID]]) -> None:
    """The other owners' requests have neither deleted nor cancelled anything."""
    for owner in OWNERS:
        with stack.http(owner) as client:
            job = client.get(f"{API}/{owned[owner]['job_id']}").json()
            batch = client.get(f"{BATCHES}/{owned[owner]['batch_id']}").json()
            listed = client.get(f"{API}?limit=100").json()["restorations"]
        assert job["status"] != "cancelled"
        assert batch["counts"]["cancelled"] == 0
        assert {each["batch_id"] for each in listed} == {None, batch["id"]}


@pytest.mark.tenants
def test_an_admin_reaches_all_of_it(stack: Stack, owned: Mapping[str, Mapping[str, UUID]]) -> None:
    """An admin uses the owners' routes; other users may not list another owner's jobs."""
    with stack.http("operator", [Scope.ADMIN]) as admin:
        for owner in OWNERS:
            assert admin.get(f"{API}/{owned[owner]['job_id']}").status_code == 200
            listed = admin.get(API, params={"owner": owner}).json()["restorations"]
            assert str(owned[owner]["job_id"]) in {each["id"] for each in listed}
    with stack.http(OWNERS[0]) as client:
        refused = client.get(API, params={"owner": OWNERS[1]})
    assert (refused.status_code, refused.json()["details"]) == (403, {"scope": "admin"})
