"""Report figures as a table for the terminal, as Markdown, as JSON and as a chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure as Chart
from rich.table import Table

from benchmarks.figures import Figure

_COLUMNS = ("Figure", "Value", "Spread", "Goal", "Met")
_MET, _MISSED, _GOAL = "#2e7d32", "#c62828", "#607d8b"
_FURTHEST = 8.0  # Figures further from their goal are drawn at this factor.


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
        f"{_number(figure.value)}{unit}",
        f"{_number(low)} to {_number(high)}",
        f"{figure.goal}{unit}",
        "yes" if figure.met else "no",
    )


def _number(value: float) -> str:
    """Format a number with three significant digits, and no exponent below a million."""
    return f"{float(f'{value:.3g}'):g}"


def write_json(figures: Sequence[Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([figure.as_json() for figure in figures], indent=1) + "\n")


def write_chart(figures: Sequence[Figure], path: Path) -> None:
    """Draw each figure as the factor by which it beats or misses its goal; lines show the
    spread."""
    chart = Chart(figsize=(10, 0.36 * len(figures) + 0.9), layout="constrained")
    axes = chart.subplots()
    for place, figure in enumerate(reversed(figures)):
        value = _drawn(figure.goal.reach(figure.value))
        low, high = sorted(_drawn(figure.goal.reach(end)) for end in figure.spread)
        axes.barh(place, value - 1, left=1, color=_MET if figure.met else _MISSED, height=0.6)
        axes.hlines(place, low, high, color="black", linewidth=1)
        _, told, _, goal, _ = _row(figure)
        axes.text(_FURTHEST * 1.15, place, f"{told} ({goal})", va="center")
    axes.axvline(1, color=_GOAL, linewidth=1)
    axes.set_yticks(range(len(figures)), [figure.name for figure in reversed(figures)])
    axes.set_xscale("log", base=2)
    axes.set_xlim(1 / _FURTHEST, _FURTHEST)
    axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["⅛", "¼", "½", "goal", "2 x", "4 x", "8 x"])
    axes.margins(y=0.01)
    axes.set_xlabel("further right is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none"}):  # text instead of outlines
        chart.savefig(path, format="svg", metadata={"Date": None})


def _drawn(reach: float) -> float:
    return min(max(reach, 1 / _FURTHEST), _FURTHEST)
