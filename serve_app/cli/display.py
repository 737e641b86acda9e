"""Terminal output of the `restore` commands: progress, tables and the greeting of `restore up`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from comfy_pool.doctor.engine import Finding
from restoration.batches import BatchCounts
from restoration.events import Previewed, Progressed, StateChanged
from restoration.jobs import JobStatus
from serve_app.client import RestorationClient
from serve_app.local.record import StackRecord
from serve_app.schemas.batches import BatchProgress, BatchView
from serve_app.schemas.restorations import Restoration


@contextmanager
def steps(console: Console) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the newest step in a spinner, or as a line without a terminal.

    A step may be any text, such as the last line of a log.
    """
    if not console.is_terminal:
        seen = ""

        def show(step: str) -> None:
            nonlocal seen
            if step != seen:
                console.print(step, soft_wrap=True, markup=False)
                seen = step

        yield show
        return
    with console.status("") as status:
        yield lambda step: status.update(escape(step))


def follow(console: Console, client: RestorationClient, job: Restoration) -> Restoration:
    """Show a job's progress until it has ended, and return the job."""
    with _progress(console) as show:
        for event in client.events(job.id):
            match event:
                case StateChanged(status=status):
                    show(status, 1.0 if status is JobStatus.SUCCEEDED else None)
                case Progressed(fraction=fraction, stage=stage):
                    show(stage, fraction)
                case Previewed():
                    pass  # a terminal cannot show an image
    return client.get(job.id)


def follow_batch(console: Console, client: RestorationClient, batch_id: UUID) -> BatchView:
    """Show a batch's counts until it has ended, and return the batch."""
    with _progress(console) as show:
        for batch in client.batch_events(batch_id):
            counts = BatchCounts(**batch.counts.model_dump())
            show(counts_text(batch), counts.ended / counts.total)
    return client.batch(batch_id)


def counts_text(batch: BatchProgress) -> str:
    """Return every count that is not zero: `98 succeeded, 2 failed`."""
    counts = batch.counts.model_dump().items()
    return ", ".join(f"{count} {status}" for status, count in counts if count)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float | None], None]]:
    """Yield a function that shows a step and, if known, the fraction of all work that is done.

    It updates a bar, or prints each new step as a line without a terminal.
    """
    if not console.is_terminal:
        shown = ""

        def show(step: str, fraction: float | None) -> None:
            nonlocal shown
            if step != shown:
                share = "" if fraction is None else f"{fraction:4.0%} "
                console.print(f"{share}{step}", soft_wrap=True)
                shown = step

        yield show
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("waiting", total=1.0)
        yield lambda step, fraction: progress.update(task, description=step, completed=fraction)


def jobs_table(jobs: Iterable[Restoration]) -> Table:
    table = _listing("job", "status", "workflow", "created", "took")
    for job in jobs:
        # in 80 columns a failure's code fits only below the id
        name = f"{job.id}\n  {job.failure.code}" if job.failure else str(job.id)
        created = job.created_at.astimezone().strftime("%m-%d %H:%M")
        took = ""
        if job.started_at is not None and job.finished_at is not None:
            took = f"{(job.finished_at - job.started_at).total_seconds():.1f} s"
        table.add_row(name, job.status, job.workflow, created, took)
    return table


def batches_table(batches: Iterable[BatchView]) -> Table:
    table = _listing("batch", "status", "photos", "created", "counts")
    for batch in batches:
        created = batch.created_at.astimezone().strftime("%m-%d %H:%M")
        table.add_row(str(batch.id), batch.status, str(batch.size), created, counts_text(batch))
    return table


def _listing(kind: str, *columns: str) -> Table:
    """Return an empty table whose first column has ids, unwrapped so that they can be copied."""
    table = Table(box=None, pad_edge=False)
    table.add_column(kind, no_wrap=True, min_width=36)
    for name in columns:
        table.add_column(name)
    return table


def findings_table(findings: Iterable[Finding]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "check", "result", "remedy"):
        table.add_column(name, overflow="fold")  # not cut, so that names and paths can be copied
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.name, escape(finding.detail), escape(finding.remedy))
    return table


def welcome(console: Console, stack: StackRecord) -> None:
    console.print(f"\n[bold]comfy-restore is running at {stack.url}[/]")
    console.print("  restore run photo.jpg -o restored.png    restore a photo")
    console.print("  restore jobs                             list jobs")
    if stack.issuer is not None:
        console.print("  restore token                            print a token, for curl")
    console.print("  restore down                             stop (or press Ctrl-C here)\n")
