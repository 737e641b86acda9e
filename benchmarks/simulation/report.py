"""Report the simulated days as a table, as JSON and as a chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure as Chart
from rich.table import Table

from benchmarks.simulation.day import Outcome
from benchmarks.simulation.traffic import DAY_S, HOUR_S, Photo
from restoration.jobs import Priority

Outcomes = Mapping[str, Outcome]

_COLUMNS = ("Policy", "GPU hours", "of fixed", "p95 wait, interactive", "p95 wait, batch", "Lost")
_WINDOW_S = 600


def rows(outcomes: Outcomes) -> list[tuple[str, ...]]:
    fixed_hours = outcomes["fixed"].gpu_hours
    return [
        (
            name,
            f"{outcome.gpu_hours:.1f}",
            f"{outcome.gpu_hours / fixed_hours:.0%}",
            *(f"{outcome.p95_wait_s(priority):.1f} s" for priority in Priority),
            str(outcome.losses),
        )
        for name, outcome in outcomes.items()
    ]


def as_table(outcomes: Outcomes) -> Table:
    table = Table(*_COLUMNS)
    for row in rows(outcomes):
        table.add_row(*row)
    return table


def as_markdown(outcomes: Outcomes) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(outcomes))])


def write_json(outcomes: Outcomes, goals: Mapping[str, bool], seed: int, path: Path) -> None:
    policies = {
        name: {
            "gpu_hours": round(outcome.gpu_hours, 2),
            "p95_wait_s": {each.value: round(outcome.p95_wait_s(each), 2) for each in Priority},
            "workers_lost": outcome.losses,
        }
        for name, outcome in outcomes.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = {"seed": seed, "policies": policies, "goals": dict(goals)}
    path.write_text(json.dumps(answer, indent=1) + "\n")


def write_chart(outcomes: Outcomes, photos: Sequence[Photo], path: Path) -> None:
    """Draw the submitted work above, and the paid nodes of each policy below."""
    chart = Chart(figsize=(9, 6), layout="constrained")
    work, nodes = chart.subplots(2, 1, sharex=True)
    windows = range(0, DAY_S, _WINDOW_S)
    hours = [start_s / HOUR_S for start_s in windows]
    work.stackplot(
        hours,
        *(_gpus_needed(photos, priority, windows) for priority in Priority),
        labels=list(Priority),
        step="post",
    )
    work.set_ylabel("GPUs that the submissions\nof ten minutes would keep busy")
    for name, outcome in outcomes.items():
        at_h = [at_s / HOUR_S for at_s, _ in outcome.nodes]
        label = f"{name}: {outcome.gpu_hours:.0f} GPU hours"
        nodes.step(at_h, [count for _, count in outcome.nodes], where="post", label=label)
    nodes.set_ylabel("nodes paid for")
    nodes.set_xlabel("hour of the day")
    nodes.set_xlim(0, 24)
    nodes.set_ylim(0)
    for axes in (work, nodes):
        axes.legend(loc="upper left", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, format="svg", metadata={"Date": None})


def _gpus_needed(photos: Sequence[Photo], priority: Priority, windows: range) -> list[float]:
    work_s = dict.fromkeys(windows, 0.0)
    for photo in photos:
        if photo.job.options.priority is priority:
            work_s[int(photo.at_s // _WINDOW_S) * _WINDOW_S] += photo.execute_s
    return [seconds / _WINDOW_S for seconds in work_s.values()]
