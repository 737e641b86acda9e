"""When a benchmark meets its goal, and when it fails the run."""

from __future__ import annotations

import math

import pytest

from benchmarks.events import known_at
from benchmarks.figures import Figure, Goal


@pytest.mark.bench
@pytest.mark.parametrize(
    ("goal", "value", "met", "missed"),
    [
        (Goal(2, at_least=True), 2.0, True, False),
        (Goal(2, at_least=True), 1.95, False, False),
        (Goal(2, at_least=True), 1.89, False, True),
        (Goal(35, at_least=False), 35.0, True, False),
        (Goal(35, at_least=False), 36.0, False, False),
        (Goal(35, at_least=False), 37.0, False, True),
        (Goal(0, at_least=False), 0.0, True, False),
        (Goal(0, at_least=False), 1.0, False, True),
        (Goal(0.98, at_least=True, tolerance=0), 0.979, False, True),
    ],
)
def test_a_goal_is_met_exactly_and_missed_beyond_its_tolerance(
    goal: Goal, value: float, met: bool, missed: bool
) -> None:
    """The table shows each unmet goal; the run fails only beyond the variation that figures of that
    kind have between runs."""
    assert (goal.met(value), goal.missed(value)) == (met, missed)


@pytest.mark.bench
@pytest.mark.parametrize(
    ("goal", "value", "reach"),
    [
        (Goal(2, at_least=True), 3.0, 1.5),
        (Goal(30, at_least=False), 20.0, 1.5),
        (Goal(5, at_least=False), -1.0, math.inf),
        (Goal(0, at_least=False), 0.0, 1.0),
        (Goal(0, at_least=False), 1.0, 0.0),
    ],
)
def test_what_is_better_is_drawn_further_on(goal: Goal, value: float, reach: float) -> None:
    """For figures that should stay small, zero or less is never a miss."""
    assert goal.reach(value) == reach


@pytest.mark.bench
def test_a_figure_is_its_median_and_is_told_with_its_extremes() -> None:
    """One good round does not make a figure good."""
    figure = Figure("jobs/s", [2.5, 1.6, 1.7], Goal(1.8, at_least=True))
    assert figure.as_json() == {
        "name": "jobs/s",
        "value": 1.7,
        "spread": [1.6, 2.5],
        "goal": "at least 1.8",
        "met": False,
        "unit": "",
        "parts": "",
    }


@pytest.mark.bench
def test_a_step_without_an_event_counts_until_the_next_one() -> None:
    """A late event makes the figure worse and is not left out of it."""
    seen = {1: 10.0, 3: 12.5, 4: 13.0}
    assert [known_at(step, seen) for step in (1, 2, 3)] == [10.0, 12.5, 12.5]
