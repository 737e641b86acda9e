"""`python -m tests.chaos --seconds N [--seed S]`: break a stack of its own, and judge the outcome.

The exit status is 0 if every figure in `Verdict.ok` is 0, else 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.chaos.breaking import Plan
from tests.chaos.driver import run
from tests.chaos.verdict import Verdict

REPORT = Path("build/chaos.json")
LOGS = Path("build/chaos-logs")
console = Console(highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=1, help="How long things are broken.")] = 600,
    seed: Annotated[int, typer.Option(help="Chooses the faults and their order.")] = 0,
    faults_every: Annotated[float, typer.Option(help="Mean seconds between two faults.")] = 5.0,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown, too.")] = False,
) -> None:
    """Break one part of the stack after another while jobs run."""
    plan = Plan(seconds, seed, faults_every_s=faults_every, logs=LOGS)
    verdict = run(plan, console.print)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(verdict.as_json(), indent=1) + "\n")
    console.print(_table(verdict))
    for line in [*verdict.offenders, *(f"{n} x {what}" for what, n in verdict.troubles.items())]:
        console.print(f"  {line}")
    if markdown:
        console.print(as_markdown(verdict), markup=False)
    raise typer.Exit(0 if verdict.ok else 1)


def _table(verdict: Verdict) -> Table:
    table = Table("", "", title="chaos", show_header=False)
    for name, value in verdict.table():
        table.add_row(name.replace("**", ""), value)
    for name, count in sorted(verdict.faults.items()):
        table.add_row(f"  {name}", f"{count}  {_delay(verdict, name)}", style="dim")
    return table


def as_markdown(verdict: Verdict) -> str:
    """Return the figures and the faults as two tables for docs/reliability.md."""
    figures = [f"| {name} | {value} |" for name, value in verdict.table()]
    faults = [
        f"| {name} | {count} | {_delay(verdict, name)} |"
        for name, count in sorted(verdict.faults.items())
    ]
    heads = ["| | |", "|---|---|"], ["| Fault | Times | Longest delay |", "|---|---|---|"]
    return "\n".join([*heads[0], *figures, "", *heads[1], *faults])


def _delay(verdict: Verdict, fault: str) -> str:
    return f"{verdict.delays_s[fault]:.1f} s" if fault in verdict.delays_s else ""


if __name__ == "__main__":
    app()
