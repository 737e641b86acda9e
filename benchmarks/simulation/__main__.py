"""`make simulate`: run one day under each policy, and fail if this project's misses its goals."""

from __future__ import annotations

import logging
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console

from benchmarks.simulation import report
from benchmarks.simulation.clock import make_database
from benchmarks.simulation.day import Outcome, simulate
from benchmarks.simulation.fleet import Machines
from benchmarks.simulation.policies import Fixed, Ours, Policy, ServeDefault
from benchmarks.simulation.traffic import Photo, day, peak_workers
from persistence.embedded.local import LocalServices
from restoration.jobs import Priority
from restoration.scaling import ScalingPolicy

OUT = Path("build")
MORE_WAIT_S = 10.0
SHARE_OF_HOURS = 0.5


def policies(photos: list[Photo]) -> dict[str, Policy]:
    """Return the policies, all with the maximum of the fixed fleet. Ours has the shipped settings,
    with and without the worker that it keeps warm."""
    peak = peak_workers(photos)
    ours = ScalingPolicy(
        jobs_per_worker=4,
        min_workers=0,
        max_workers=peak,
        warm_workers=1,
        upscale_delay_s=2,
        downscale_delay_s=120,
    )
    return {
        "fixed": Fixed(peak),
        "serve default": ServeDefault(peak),
        "ours": Ours(ours),
        "ours, none warm": Ours(replace(ours, warm_workers=0)),
    }


def goals(outcomes: report.Outcomes) -> dict[str, bool]:
    """Return each goal, and whether it is met."""
    fixed, ours = outcomes["fixed"], outcomes["ours"]
    interactive = Priority.INTERACTIVE
    more_s = ours.p95_wait_s(interactive) - fixed.p95_wait_s(interactive)
    return {
        f"p95 wait of interactive jobs within {MORE_WAIT_S:g} s of the fixed fleet's": (
            more_s <= MORE_WAIT_S
        ),
        f"at most {SHARE_OF_HOURS:.0%} of its GPU hours": (
            ours.gpu_hours <= SHARE_OF_HOURS * fixed.gpu_hours
        ),
    }


def main(seed: Annotated[int, typer.Option(help="which day")] = 1) -> None:
    """Simulate the same day under each policy, in a process for each."""
    console = Console(highlight=False, soft_wrap=True)
    photos = day(seed)
    chosen = policies(photos)
    console.print(f"{len(photos):,} photos, at most {peak_workers(photos)} GPUs")
    with tempfile.TemporaryDirectory(prefix="comfy-sim-", ignore_cleanup_errors=True) as folder:
        with LocalServices(Path(folder), only=["postgres"]) as services:
            server = services.urls.database_url
            urls = [make_database(server, f"day_{n}") for n in range(len(chosen))]
            with ProcessPoolExecutor(len(chosen)) as processes:
                runs = processes.map(_run, urls, chosen.values(), [seed] * len(chosen))
                outcomes = dict(zip(chosen, runs, strict=True))
    _tell(console, outcomes, photos, seed)


def _run(database_url: str, policy: Policy, seed: int) -> Outcome:
    quiet = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=quiet)  # Each lost worker logs a warning.
    return simulate(database_url, day(seed), policy, Machines(), seed)


def _tell(console: Console, outcomes: dict[str, Outcome], photos: list[Photo], seed: int) -> None:
    console.print(report.as_table(outcomes))
    met = goals(outcomes)
    for goal, is_met in met.items():
        console.print(f"{'met' if is_met else '[red]missed[/red]'}: {goal}")
    report.write_json(outcomes, met, seed, OUT / "simulate.json")
    report.write_chart(outcomes, photos, OUT / "simulate.svg")
    (OUT / "simulate.md").write_text(report.as_markdown(outcomes) + "\n")
    sys.exit(not all(met.values()))


if __name__ == "__main__":
    typer.run(main)
