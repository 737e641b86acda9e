"""The tables of `restore status`: a row for each worker, and the queue below."""

from __future__ import annotations

from datetime import datetime

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from restoration.workers import EngineState, Stage
from serve_app.schemas.workers import JobInHandView, QueueView, WorkerList, WorkerView

# Workers report about once a second: a longer silence means trouble.
SILENT_S = 10.0
_COLORS = {EngineState.READY: "green", EngineState.DOWN: "yellow", EngineState.BROKEN: "red"}
# the job in the engine comes first
_ORDER = (Stage.EXECUTING, Stage.STAGED, Stage.FETCHING, Stage.STORING)


def status_view(workers: WorkerList, queue: QueueView) -> RenderableType:
    return Group(_workers(workers), "", _queue(queue))


def _workers(roll: WorkerList) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("worker", "node", "engine", "takes jobs", "in hand"):
        table.add_column(name, overflow="fold")
    for worker in roll.workers:
        jobs = sorted(worker.in_hand, key=lambda job: _ORDER.index(job.stage))
        in_hand = "\n".join(_job(job, roll.at) for job in jobs) or "[dim]nothing[/]"
        table.add_row(
            worker.id, escape(worker.node), _engine(worker), _standing(worker, roll.at), in_hand
        )
    if not roll.workers:
        table.add_row("[dim]no workers[/]")
    return table


def _engine(worker: WorkerView) -> str:
    port = worker.engine_url.rpartition(":")[2]
    pending = ", restart pending" if worker.engine_restart_pending else ""
    version = f", ComfyUI {escape(worker.engine_version)}" if worker.engine_version else ""
    return f"[{_COLORS[worker.engine]}]{worker.engine}[/] on {escape(port)}{version}{pending}"


def _standing(worker: WorkerView, at: datetime) -> str:
    if (silent_s := (at - worker.seen_at).total_seconds()) > SILENT_S:
        return f"[red]no report for {duration(silent_s)}[/]"
    return "[yellow]drained[/]" if worker.drained else "yes"


def _job(job: JobInHandView, at: datetime) -> str:
    held = duration((at - job.claimed_at).total_seconds())
    return f"{job.stage} {job.job_id} {escape(job.workflow)} {held}"


def _queue(queue: QueueView) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("class", "waiting", "running", "longest wait"):
        table.add_column(name)
    for line in queue.lines:
        waits = (queue.at - line.oldest_at).total_seconds() if line.oldest_at else None
        longest = "" if waits is None else duration(waits)
        table.add_row(line.priority, str(line.waiting), str(line.running), longest)
    return table


def duration(seconds: float) -> str:
    """Return the two largest units of a duration: `7 s`, `3 min 5 s`, `2 h 10 min`."""
    minutes, rest_s = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"
