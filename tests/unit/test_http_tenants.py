"""Other owners' things do not exist: any history of several owners, every route and identifier."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    multiple,
    rule,
    run_state_machine_as_test,
)

from tests.fakes.site import API, Site, open_site, photo, submission
from tests.support.foreign import OWNED, assert_as_if_missing, routes_to_owned

_T = TypeVar("_T")
BATCHES = "/api/v1/batches"
DEADLINE_S = 300
OWNERS = st.sampled_from(["ann", "bob", "cyd"])
Thing = tuple[str, str, UUID]  # the parameter that names it, its owner, its id


async def _send_batch(site: Site, owner: str, photos: int) -> tuple[UUID, list[UUID]]:
    files = [("image", (f"{number}.png", photo())) for number in range(photos)]
    async with site.client(owner) as client:
        answer = (await client.post(BATCHES, files=files)).json()
    return UUID(answer["id"]), [UUID(item["job_id"]) for item in answer["items"]]


class _Tenants(RuleBasedStateMachine):
    """Several owners' things; `things` holds those that each has made, in their present state."""

    things = Bundle("things")

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._resources = AsyncExitStack()
        self._site = self._do(self._resources.enter_async_context(open_site()))
        self._routes = routes_to_owned(self._do(self._document()))
        assert {route.parameter for route in self._routes} == OWNED == {"job_id", "batch_id"}

    def teardown(self) -> None:
        self._do(self._resources.aclose())
        self._runner.close()

    def _do(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self._runner.run(call)

    async def _document(self) -> Any:
        async with self._site.client(None) as client:
            return (await client.get("/openapi.json")).json()

    @rule(target=things, owner=OWNERS)
    def submit(self, owner: str) -> Thing:
        return "job_id", owner, self._do(self._site.submit(owner))

    @rule(target=things, owner=OWNERS, photos=st.integers(1, 2))
    def submit_batch(self, owner: str, photos: int) -> Any:
        batch_id, job_ids = self._do(_send_batch(self._site, owner, photos))
        jobs = [("job_id", owner, job_id) for job_id in job_ids]
        return multiple(("batch_id", owner, batch_id), *jobs)

    @rule(ends=st.booleans(), succeeds=st.booleans())
    def work(self, ends: bool, succeeds: bool) -> None:
        """Let a worker take the best job, and end it if asked."""

        async def work() -> None:
            names = [workflow.name for workflow in self._site.services.catalog]
            job = await self._site.jobs.claim("w", 60, names)
            if job is not None and ends:
                await (self._site.succeed(job) if succeeds else self._site.fail(job))

        self._do(work())

    @rule(thing=things, caller=OWNERS)
    def ask(self, thing: Thing, caller: str) -> None:
        """Request every route: others find nothing, and their requests change nothing."""
        parameter, owner, identifier = thing
        if caller != owner:
            before = dict(self._site.jobs.rows)
            self._do(self._ask_all(parameter, identifier, caller))
            assert self._site.jobs.rows == before

    async def _ask_all(self, parameter: str, identifier: UUID, caller: str) -> None:
        nobodys = uuid4()
        # an event stream opened by mistake would not end
        async with asyncio.timeout(DEADLINE_S), self._site.client(caller) as client:
            for route in self._routes:
                if route.parameter == parameter:
                    foreign = await client.request(route.method, route.to(identifier))
                    missing = await client.request(route.method, route.to(nobodys))
                    assert_as_if_missing(foreign, missing, identifier, nobodys)

    @rule(thing=things)
    def owner_asks(self, thing: Thing) -> None:
        parameter, owner, identifier = thing
        path = API if parameter == "job_id" else BATCHES

        async def ask() -> int:
            async with self._site.client(owner) as client:
                return (await client.get(f"{path}/{identifier}")).status_code

        assert self._do(ask()) == 200

    @rule(caller=OWNERS)
    def list_all(self, caller: str) -> None:
        async def shown() -> set[str]:
            async with self._site.client(caller) as client:
                page = (await client.get(f"{API}?limit=100")).json()
            return {each["id"] for each in page["restorations"]}

        rows = self._site.jobs.rows.values()
        assert self._do(shown()) == {str(row.id) for row in rows if row.owner == caller}


@pytest.mark.tenants
@pytest.mark.minutes(5)
def test_any_history_of_several_owners() -> None:
    """In any state, a thing's existence does not change the answers to others."""
    run_state_machine_as_test(
        _Tenants,
        settings=settings(
            max_examples=15,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.tenants
@pytest.mark.parametrize("path", [API, BATCHES])
async def test_a_cursor_of_somebody_else_leads_nowhere_else(path: str) -> None:
    """A cursor from Ann's listing shows Bob only his own jobs, or is refused."""
    async with open_site() as site:
        for _ in range(3):
            await site.submit("ann")
            await _send_batch(site, "ann", 1)
        bobs = {str(await site.submit("bob"))}
        batch_id, job_ids = await _send_batch(site, "bob", 1)
        bobs |= {str(batch_id), *map(str, job_ids)}
        async with site.client("ann") as ann, site.client("bob") as bob:
            following = (await ann.get(f"{path}?limit=1")).json()["next"]
            answer = await bob.get(following)
    name = path.rpartition("/")[2]
    assert answer.status_code in (200, 400)
    assert {each["id"] for each in answer.json().get(name, ())} <= bobs


@pytest.mark.tenants
async def test_an_idempotency_key_is_its_owners() -> None:
    """A key that Ann has used creates a separate job for Bob."""
    async with open_site() as site:
        for sub in ("ann", "bob"):
            async with site.client(sub) as client:
                headers = {"Idempotency-Key": "k"}
                answer = await client.post(API, headers=headers, **submission())
                assert answer.status_code == 202
        assert sorted(row.owner for row in site.jobs.rows.values()) == ["ann", "bob"]
