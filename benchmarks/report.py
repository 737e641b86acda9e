"""A run's figures as a table for the terminal, as Markdown, as JSON and as a chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Chart
from rich.table import Table

from benchmarks.figures import Figure

_COLUMNS = ("Figure", "Value", "Spread", "Goal", "Met")
_MET, _MISSED, _GOAL = "#2e7d32", "#c62828", "#607d8b"


def as_table(figures: Sequence[Figure]) -> Table:
    table = Table(*_COLUMNS)
    for figure in figures:
        table.add_row(*_row(figure), style=None if figure.met else "red")
    return table


def as_markdown(figures: Sequence[Figure]) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    lines += ["| " + " | ".join(_row(figure)) + " |" for figure in figures]
    return "\n".join(lines)


def _row(figure: Figure) -> tuple[str, ...]:
    low, high = figure.spread
    unit = f" {figure.unit}" if figure.unit else ""
    parts = f" ({figure.parts})" if figure.parts else ""
    return (
        figure.name + parts,
        f"{figure.value:.3g}{unit}",
        f"{low:.3g} to {high:.3g}",
        f"{figure.goal}{unit}",
        "yes" if figure.met else "no",
    )


def write_json(figures: Sequence[Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([figure.as_json() for figure in figures], indent=1) + "\n")


def write_chart(figures: Sequence[Figure], path: Path) -> None:
    """A bar for each figure, as a share of its goal: to the right of the line is better."""
    chart = Chart(figsize=(9, 0.6 * len(figures) + 1.2), layout="constrained")
    axes = chart.subplots()
    for place, figure in enumerate(reversed(figures)):
        low, value, high = sorted(_to_goal(figure, each) for each in (*figure.spread, figure.value))
        axes.barh(place, value, color=_MET if figure.met else _MISSED, height=0.6)
        axes.hlines(place, low, high, color="black", linewidth=1)
    axes.axvline(1, color=_GOAL, linestyle="--", label="goal")
    axes.set_yticks(range(len(figures)), [figure.name for figure in reversed(figures)])
    axes.set_xlabel("share of the goal; further right is better")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, format="svg", metadata={"Date": None})


def _to_goal(figure: Figure, value: float) -> float:
    if not (value and figure.goal.bound):  # none of what there should be none of
        return float(figure.goal.met(value))
    share = value / figure.goal.bound
    return share if figure.goal.at_least else 1 / share
