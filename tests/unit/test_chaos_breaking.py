"""The faults that a chaos run counts as done, and their order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos import breaking
from tests.chaos.breaking import Plan, break_things
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.processes import StackProcesses

NOTHING = StackProcesses(Path("/nonexistent"))


def refused(_stack: StackProcesses, _rng: random.Random) -> str | None:
    raise PermissionError("the kernel says no")


FAKES = {
    "done": Fault("done", lambda _stack, _rng: "pid 1"),
    "refused": Fault("refused", refused),
    "no victim": Fault("no victim", lambda _stack, _rng: None),
}


def struck(*kinds: str) -> tuple[list[str], str]:
    lines: list[str] = []
    strikes = break_things(Plan(kinds=kinds, faults_every_s=0), NOTHING, lines.append)
    return [strike.kind for strike in strikes], "\n".join(lines)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaking, "BY_KIND", FAKES)
    monkeypatch.setattr(breaking, "VICTIM_S", 0.01)


def test_a_fault_that_could_not_be_done_is_not_counted() -> None:
    """A fault that the kernel refuses and one that finds no victim are reported, not counted."""
    kinds, told = struck("refused", "no victim", "done")
    assert kinds == ["done"]
    assert "refused: NOT DONE: the kernel says no" in told
    assert "no victim: NOT DONE: nothing to hit" in told


def test_a_victim_that_is_being_started_again_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault is injected even if the victim recovers slowly from the last one."""
    looks = iter([None, "pid 2"])
    late = Fault("late", lambda _stack, _rng: next(looks))
    monkeypatch.setitem(FAKES, "late", late)
    monkeypatch.setattr(breaking, "VICTIM_S", 30.0)
    assert struck("late")[0] == ["late"]


def test_kinds_that_are_asked_for_are_struck_once_each_in_their_order() -> None:
    """A plan for the suite has no time limit."""
    assert struck("done", "done", "done")[0] == ["done"] * 3


def test_without_any_asked_for_each_kind_comes_before_any_comes_again() -> None:
    """The order is random and endless; the plan's time ends it."""
    order = Plan(seconds=600).faults(random.Random(1))  # noqa: S311 - chance, not a secret
    kinds = [next(order).kind for _ in range(2 * len(FAULTS))]
    everything = sorted(fault.kind for fault in FAULTS)
    assert sorted(kinds[: len(FAULTS)]) == sorted(kinds[len(FAULTS) :]) == everything
    assert kinds[: len(FAULTS)] != kinds[len(FAULTS) :]
