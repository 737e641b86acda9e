"""Progress bars, tables and messages of the commands."""

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
from restoration.events import JobEvent, Previewed, Progressed, StateChanged
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

        def tell(step: str) -> None:
            nonlocal seen
            if step != seen:
                console.print(step, soft_wrap=True, markup=False)
                seen = step

        yield tell
        return
    with console.status("") as status:
        yield lambda step: status.update(escape(step))


def follow(console: Console, client: RestorationClient, job: Restoration) -> Restoration:
    """Show a job's progress until it has ended, and return the job."""
    show = _bar if console.is_terminal else _lines
    show(console, (view for event in client.events(job.id) for view in _views(event)))
    return client.get(job.id)


def follow_batch(console: Console, client: RestorationClient, batch_id: UUID) -> BatchView:
    """Show a batch's counts until it has ended, and return the batch."""
    show = _bar if console.is_terminal else _lines
    show(console, map(_standing, client.batch_events(batch_id)))
    return client.batch(batch_id)


def counts_text(batch: BatchProgress) -> str:
    """Return every count that is not zero: `98 succeeded, 2 failed`."""
    counts = batch.counts.model_dump().items()
    return ", ".join(f"{count} {what}" for what, count in counts if count)


def _standing(batch: BatchProgress) -> tuple[str, float | None]:
    counts = BatchCounts(**batch.counts.model_dump())
    return counts_text(batch), counts.ended / counts.total


def _views(event: JobEvent) -> Iterator[tuple[str, float | None]]:
    """Yield a description of the event and, if known, the fraction that is done."""
    match event:
        case StateChanged(status=status):
            yield status, 1.0 if status is JobStatus.SUCCEEDED else None
        case Progressed(fraction=fraction, stage=stage):
            yield stage, fraction
        case Previewed():
            return  # a terminal cannot show a picture


def _bar(console: Console, views: Iterable[tuple[str, float | None]]) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("waiting", total=1.0)
        for doing, fraction in views:
            progress.update(task, description=doing, completed=fraction)


def _lines(console: Console, views: Iterable[tuple[str, float | None]]) -> None:
    shown = ""
    for doing, fraction in views:
        if doing != shown:
            share = "" if fraction is None else f"{fraction:4.0%} "
            console.print(f"{share}{doing}", soft_wrap=True)
            shown = doing


def jobs_table(jobs: Iterable[Restoration]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("job", no_wrap=True, min_width=36)  # unwrapped, so that it can be copied
    for name in ("status", "workflow", "created", "took"):
        table.add_column(name)
    for job in jobs:
        # in 80 columns a failure's code fits only below the id
        name = f"{job.id}\n  {job.failure.code}" if job.failure else str(job.id)
        created = job.created_at.astimezone().strftime("%m-%d %H:%M")
        table.add_row(name, job.status, job.workflow, created, _took(job))
    return table


def batches_table(batches: Iterable[BatchView]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("batch", no_wrap=True, min_width=36)  # unwrapped, so that it can be copied
    for name in ("status", "photos", "created", "counts"):
        table.add_column(name)
    for batch in batches:
        created = batch.created_at.astimezone().strftime("%m-%d %H:%M")
        table.add_row(str(batch.id), batch.status, str(batch.size), created, counts_text(batch))
    return table


def _took(job: Restoration) -> str:
    if job.started_at is None or job.finished_at is None:
        return ""
    return f"{(job.finished_at - job.started_at).total_seconds():.1f} s"


def findings_table(findings: Iterable[Finding]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "check", "result", "fix"):
        table.add_column(name, overflow="fold")  # not cut, so that names and paths can be copied
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.name, escape(finding.detail), escape(finding.mend))
    return table


def welcome(console: Console, stack: StackRecord) -> None:
    console.print(f"\n[bold]comfy-restore is running at {stack.url}[/]")
    console.print("  restore run photo.jpg -o restored.png    restore a photo")
    console.print("  restore jobs                             list jobs")
    if stack.issuer is not None:
        console.print("  restore token                            print a token, for curl")
    console.print("  restore down                             stop (or press Ctrl-C here)\n")
