"""`make bench`: run the benchmarks, report their figures, and fail if a goal is missed."""

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
from benchmarks.fairness import fairness
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

# Benchmarks of times rather than ratios come first: half an hour of full load on a shared machine
# can double a time. Those with services of their own, or none, come next, because the shared
# service runs until the end and takes a fifth of a core when idle.
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
# Run only when named: figures without a goal, and one that needs the machine for itself.
BY_NAME: dict[str, Benchmark] = {"serve": serve_settings, "fairness": fairness}
OUT = Path("build")


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help=f"any of: {', '.join([*BENCHMARKS, *BY_NAME])}")
    ] = None,
) -> None:
    """Run all benchmarks, or only those named."""
    quiet = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(wrapper_class=quiet)  # Engines log a line for each job.
    console = Console(highlight=False, soft_wrap=True)
    if unknown := set(only or ()) - set(BENCHMARKS) - set(BY_NAME):
        raise typer.BadParameter(f"no such benchmark: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which stops started stacks
    bench = Bench(console.print)
    figures: list[Figure] = []
    try:
        with bench.resources:
            for name, run in {**BENCHMARKS, **BY_NAME}.items():
                if name in (only or BENCHMARKS):
                    console.print(f"[bold]{name}[/bold]")
                    figures += run(bench)
    finally:  # Report the figures measured so far even if a benchmark fails.
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
