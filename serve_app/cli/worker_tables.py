"""The tables of `restore status`: a row for each worker, and the queue below."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from restoration.workers import EngineState, Stage
from serve_app.schemas.workers import QueueView, WorkerList

# Workers report about once a second: a longer silence means trouble.
SILENT_S = 10.0
_COLORS = {EngineState.READY: "green", EngineState.DOWN: "yellow", EngineState.BROKEN: "red"}
# the job in the engine comes first
_ORDER = (Stage.EXECUTING, Stage.STAGED, Stage.FETCHING, Stage.STORING)


def status_view(workers: WorkerList, queue: QueueView) -> RenderableType:
    return Group(_workers_table(workers), "", _queue_table(queue))


def _workers_table(roll: WorkerList) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("worker", "node", "engine", "takes jobs", "in hand"):
        table.add_column(name, overflow="fold")
    for worker in roll.workers:
        port = worker.engine_url.rpartition(":")[2]
        version = f", ComfyUI {escape(worker.engine_version)}" if worker.engine_version else ""
        pending = ", restart pending" if worker.engine_restart_pending else ""
        engine = f"[{_COLORS[worker.engine]}]{worker.engine}[/] on {escape(port)}"
        takes_jobs = "[yellow]drained[/]" if worker.drained else "yes"
        if (silent_s := (roll.at - worker.seen_at).total_seconds()) > SILENT_S:
            takes_jobs = f"[red]no report for {duration(silent_s)}[/]"
        jobs = [
            f"{job.stage} {job.job_id} {escape(job.workflow)} "
            f"{duration((roll.at - job.claimed_at).total_seconds())}"
            for job in sorted(worker.in_hand, key=lambda job: _ORDER.index(job.stage))
        ]
        table.add_row(
            worker.id,
            escape(worker.node),
            f"{engine}{version}{pending}",
            takes_jobs,
            "\n".join(jobs) or "[dim]nothing[/]",
        )
    if not roll.workers:
        table.add_row("[dim]no workers[/]")
    return table


def _queue_table(queue: QueueView) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("class", "waiting", "running", "longest wait"):
        table.add_column(name)
    for line in queue.lines:
        longest = duration((queue.at - line.oldest_at).total_seconds()) if line.oldest_at else ""
        table.add_row(line.priority, str(line.waiting), str(line.running), longest)
    return table


def duration(seconds: float) -> str:
    """Return the two largest units of a duration: `7 s`, `3 min 5 s`, `2 h 10 min`."""
    minutes, rest_s = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"
