"""Dependencies are pinged at most once a second, for any number of callers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from restoration.errors import DependencyUnavailable
from restoration.tasks import stop
from serve_app.readiness import MIN_INTERVAL_S, ReadinessProbe
from tests.fakes.site import open_site


class _Dependency:
    """Counts its pings, and answers one when `gate` is open."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pings = 0
        self.down = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def ping(self) -> None:
        self.pings += 1
        await self.gate.wait()
        if self.down:
            raise DependencyUnavailable("down")


@pytest.fixture
def dependency() -> _Dependency:
    return _Dependency()


@pytest.fixture
async def probe(dependency: _Dependency) -> AsyncIterator[ReadinessProbe]:
    probe = ReadinessProbe({"store": dependency.ping}, clock=lambda: dependency.now_s)
    yield probe
    await probe.aclose()


async def test_callers_within_a_second_share_one_round(
    dependency: _Dependency, probe: ReadinessProbe
) -> None:
    """Simultaneous callers wait for the same pings, and those soon after get their results."""
    dependency.gate.clear()
    callers = [asyncio.create_task(probe.results()) for _ in range(50)]
    await asyncio.sleep(0)
    dependency.gate.set()
    assert await asyncio.gather(*callers) == [{"store": "ok"}] * 50
    dependency.now_s += MIN_INTERVAL_S / 2
    assert await probe.results() == {"store": "ok"}
    assert dependency.pings == 1


async def test_a_dependency_that_fails_is_seen_after_a_second(
    dependency: _Dependency, probe: ReadinessProbe
) -> None:
    """Results are never older than the interval."""
    await probe.results()
    dependency.down = True
    dependency.now_s += MIN_INTERVAL_S
    assert await probe.results() == {"store": "error"}
    dependency.down = False
    dependency.now_s += MIN_INTERVAL_S
    assert await probe.results() == {"store": "ok"}


async def test_callers_that_leave_do_not_have_it_asked_again(
    dependency: _Dependency, probe: ReadinessProbe
) -> None:
    """A client that hangs up ends neither the round nor the next caller's wait for it."""
    dependency.gate.clear()
    for _ in range(20):
        caller = asyncio.create_task(probe.results())
        await asyncio.sleep(0)
        await stop(caller)
    dependency.gate.set()
    assert await probe.results() == {"store": "ok"}
    assert dependency.pings == 1


async def test_readyz_asks_its_services_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds over HTTP too, without a token."""
    dependency = _Dependency()
    async with open_site() as site:
        monkeypatch.setattr(site.jobs, "ping", dependency.ping)
        async with site.client(sub=None) as client:
            answers = await asyncio.gather(*(client.get("/readyz") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert dependency.pings == 1
