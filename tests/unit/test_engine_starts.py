"""The pace of an engine's starts, and which run is blamed for the end of an engine."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_pool.limits import EngineLimits
from comfy_pool.process.restart_backoff import RestartBackoff
from comfy_pool.runs.session import EngineSession
from restoration.errors import EngineCrashed, EngineStalled, EngineUnavailable


def pauses(starts: RestartBackoff, count: int) -> list[float]:
    found = []
    for _ in range(count):
        starts.succeeded()
        found.append(starts.pause_s())
    return found


@pytest.mark.engine_health
def test_starts_are_further_and_further_apart() -> None:
    """Pauses double from 0.5 s to 30 s, each with jitter of up to half, without limit: an engine
    that dies while idle is restarted for hours."""
    starts = RestartBackoff(EngineLimits())
    assert starts.pause_s() == 0
    ceilings = [0.5, 1, 2, 4, 8, 16, *[30] * 1100]
    for pause_s, ceiling in zip(pauses(starts, len(ceilings)), ceilings, strict=True):
        assert 0.4 * ceiling < pause_s <= ceiling


@pytest.mark.engine_health
def test_a_run_that_succeeds_ends_the_backoff() -> None:
    """After it, an engine that dies restarts at once, and the next pauses are short again."""
    starts = RestartBackoff(EngineLimits())
    pauses(starts, 10)
    starts.run_succeeded()
    assert starts.pause_s() == 0
    assert pauses(starts, 1)[0] <= 0.5


@pytest.mark.engine_health
def test_only_starts_that_fail_in_a_row_break_an_engine() -> None:
    """A successful start resets the count; the last error is the one shown."""
    starts = RestartBackoff(EngineLimits(broken_after_starts=2))
    starts.failed(EngineUnavailable("first"))
    starts.succeeded()
    starts.failed(EngineUnavailable("second"))
    assert starts.broken is None
    starts.failed(EngineUnavailable("third"))
    assert str(starts.broken) == "third"
    starts.succeeded()
    assert starts.broken is None


@pytest.fixture
async def session() -> EngineSession:
    async def stop() -> None: ...

    host: Any = SimpleNamespace(stop=stop)
    unused: Any = None
    return EngineSession(unused, host, asyncio.get_running_loop().create_future(), unused)


def blamed(session: EngineSession, *runs: str) -> list[str]:
    return [run for run in runs if not isinstance(session.end_for(run), EngineUnavailable)]


@pytest.mark.isolation
async def test_the_run_that_executed_is_held_responsible(session: EngineSession) -> None:
    """Only the run that executed is blamed: no part of the others was executed."""
    for run in "abc":
        session.submitted(run)
    session.executed("a")
    session.began("b")
    session.ended.set_result("was killed")
    assert isinstance(session.end_for("b"), EngineCrashed)
    assert blamed(session, "a", "b", "c", "uploading") == ["b"]


@pytest.mark.isolation
async def test_without_events_the_first_in_line_is_held_responsible(session: EngineSession) -> None:
    """A prompt that kills the engine at once is found although its start was never reported."""
    for run in "abc":
        session.submitted(run)
    session.executed("a")
    session.ended.set_result("was killed")
    assert blamed(session, "a", "b", "c") == ["b"]


@pytest.mark.isolation
async def test_the_blame_stays_when_the_blamed_has_left(session: EngineSession) -> None:
    """Runs learn of the end one after the other; the second in line does not move up."""
    for run in "ab":
        session.submitted(run)
    session.ended.set_result("was killed")
    assert blamed(session, "a") == ["a"]
    session.left("a")
    assert blamed(session, "b") == []


@pytest.mark.isolation
async def test_an_engine_that_hangs_speaks_against_one_run(session: EngineSession) -> None:
    """Whichever run first notices that the engine is silent, the one that executed has stalled."""
    for run in "ab":
        session.submitted(run)
    await session.give_up("the engine does not respond")
    await session.give_up("later news")
    assert not session.alive
    assert isinstance(session.end_for("b"), EngineUnavailable)
    assert isinstance(session.end_for("a"), EngineStalled)
    assert str(session.end_for("a")) == "the engine does not respond"
