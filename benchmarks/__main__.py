"""`make bench`: run the benchmarks, show and write their figures, and fail for a missed goal."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console

from benchmarks import report
from benchmarks.claims import claim_time
from benchmarks.events import event_latency
from benchmarks.figures import Bench, Benchmark, Figure
from benchmarks.large import large_pictures
from benchmarks.many_workers import many_workers
from benchmarks.memory import memory_growth
from benchmarks.pool import busy_pool
from benchmarks.reads import status_reads
from benchmarks.rivals import api_proxy, usual_service
from benchmarks.serve_settings import serve_settings
from benchmarks.single import single
from benchmarks.submits import submits
from benchmarks.throughput import throughput

# First what is a time and no ratio, which half an hour of full load on a shared machine can double.
# Then what has services of its own, or none: the one that the others share stays until the end, and
# takes a fifth of a core when it has nothing to do.
BENCHMARKS: dict[str, Benchmark] = {
    "single": single,
    "pool": busy_pool,
    "submits": submits,
    "claims": claim_time,
    "workers": many_workers,
    "memory": memory_growth,
    "throughput": throughput,
    "reads": status_reads,
    "events": event_latency,
    "large": large_pictures,
    "usual": usual_service,
    "proxy": api_proxy,
}
# Only when they are named: what they say is about no goal.
BY_NAME: dict[str, Benchmark] = {"serve": serve_settings}
OUT = Path("build")


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help=f"any of: {', '.join([*BENCHMARKS, *BY_NAME])}")
    ] = None,
) -> None:
    """Run all benchmarks, or those that are named."""
    quiet = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(wrapper_class=quiet)  # engines say a line for each job
    console = Console(highlight=False, soft_wrap=True)
    if unknown := set(only or ()) - set(BENCHMARKS) - set(BY_NAME):
        raise typer.BadParameter(f"no such benchmark: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end the stacks that were started
    bench = Bench(console.print)
    figures: list[Figure] = []
    try:
        with bench.resources:
            for name, run in {**BENCHMARKS, **BY_NAME}.items():
                if name in (only or BENCHMARKS):
                    console.print(f"[bold]{name}[/bold]")
                    figures += run(bench)
    finally:  # what was measured is told, also when another benchmark breaks
        _tell(console, figures)
    sys.exit(any(figure.goal.missed(figure.value) for figure in figures))


def _tell(console: Console, figures: Sequence[Figure]) -> None:
    if not figures:
        return
    console.print(report.as_table(figures))
    report.write_json(figures, OUT / "bench.json")
    report.write_chart(figures, OUT / "bench.svg")
    (OUT / "bench.md").write_text(report.as_markdown(figures) + "\n")


if __name__ == "__main__":
    typer.run(main)
