"""The record of a state folder's local stack, and starting and stopping it from outside.

Imports nothing heavy, since every command reads the record first.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import psutil

from persistence.embedded.state import LOCK, holder_of, holding, write_private
from restoration.errors import SetupError
from restoration.webhooks.messages import SECRET_PREFIX
from serve_app.local.processes import end_all, is_alive, mark, processes_of, wait_for_end

STOP_S = 22.0  # for an orderly stop; then the rest is killed
STOP_MARGIN_S = 7.0  # of that, time beyond the running jobs' own
START_POLL_S = 0.1
# Exit statuses of Ray's process: it failed for a lasting reason, or has lost its Ray.
FAILED_STATUS, LOST_STATUS = 1, 3
_RECORD = "stack.json"
_REPORT = "ray.json"
_LOG = "up.log"


@dataclass(frozen=True, slots=True)
class StackOptions:
    workers: int = 1
    port: int = 8000


@dataclass(frozen=True, slots=True)
class StackRecord:
    """A running stack: its address, Ray's, that of its own issuer, if any, and of its metrics.

    `pid` is the process of `restore up`; the whole stack ends with it. `lost` is the reason why Ray
    was lost, while Ray restarts. `drain_s` is the time in seconds that running jobs have when the
    stack stops.
    """

    pid: int
    url: str
    ray_address: str = ""
    issuer: str | None = None
    metrics: str | None = None
    drain_s: float = 0.0
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class RayReport:
    """The folder of Ray's files, its address (GCS), and the URL of its metrics for Prometheus.

    `ready` is set once the service is running on it.
    """

    session_dir: str
    gcs: str
    metrics: str
    ready: bool = False


def find_stack(state_dir: Path) -> StackRecord | None:
    """Return the stack of this state folder if it is serving, or restarting its lost Ray."""
    try:
        record = json.loads((state_dir / _RECORD).read_bytes())
    except FileNotFoundError:
        return None
    # a stack that was killed leaves its record behind
    return StackRecord(**record) if record["pid"] == holder_of(state_dir) else None


@contextmanager
def recording(state_dir: Path) -> Iterator[Callable[[StackRecord], None]]:
    """Yield a function that publishes the stack's record, and remove the record at the end."""
    path = state_dir / _RECORD
    try:
        yield lambda record: write_private(path, json.dumps(asdict(record)))
    finally:
        path.unlink(missing_ok=True)


def report_path(state_dir: Path) -> Path:
    """Return the file to which Ray's process writes its RayReport."""
    return state_dir / _REPORT


def find_report(state_dir: Path) -> RayReport | None:
    """Return the report of the folder's newest Ray, which need not be running any more."""
    try:
        return RayReport(**json.loads(report_path(state_dir).read_bytes()))
    except FileNotFoundError:
        return None


def ray_session(state_dir: Path) -> Path | None:
    """Return the folder of the newest Ray's own files, if there is a report."""
    report = find_report(state_dir)
    return Path(report.session_dir) if report else None


def demand_down(state_dir: Path) -> None:
    """Raise SetupError if a stack of this state folder is running or starting."""
    if (pid := holder_of(state_dir)) is not None:
        stack = find_stack(state_dir)
        trouble = f", which is restarting its Ray ({stack.lost})" if stack and stack.lost else ""
        raise SetupError(
            f"a local stack is already running in {state_dir} (pid {pid}){trouble}; stop it "
            "with `restore down`"
        )


def issuer_folder(state_dir: Path) -> Path:
    return state_dir / "issuer"


def webhook_secret(state_dir: Path) -> str:
    """Return the secret that signs the local stack's webhooks.

    It is created on first use, and kept.
    """
    path = state_dir / "webhook-secret"
    if not path.exists():
        write_private(path, SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode())
    return path.read_text()


def start_detached(
    state_dir: Path, options: StackOptions, environ: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[bytes]:
    """Start the stack as a separate process; `environ` is added to its environment."""
    state_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "serve_app.cli.main", "up"]
    command += ["--workers", str(options.workers), "--port", str(options.port)]
    with (state_dir / _LOG).open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                **environ,
                **mark(state_dir),
                "COMFY_RESTORE_STATE": str(state_dir),
            },
            start_new_session=True,
        )


def wait_until_serving(
    stack: subprocess.Popen[bytes], state_dir: Path, progress: Callable[[str], None]
) -> StackRecord:
    """Return the record of a detached stack once it serves.

    Raises SetupError with the last line of its log if it ends before that.
    """
    log_path = state_dir / _LOG
    while stack.poll() is None:
        record = find_stack(state_dir)
        # a stack that loses Ray before it has ever served tries again
        if record is not None and record.pid == stack.pid and record.lost is None:
            return record
        progress(_last_line(log_path) or "starting")
        time.sleep(START_POLL_S)
    last_words = _last_line(log_path).removeprefix("error: ")
    raise SetupError(f"the local stack did not start: {last_words}; see {log_path}")


def _last_line(path: Path) -> str:
    return (path.read_text(errors="replace").rstrip().splitlines() or [""])[-1]


def stop_stack(state_dir: Path) -> bool:
    """End the stack of this state folder, whatever its state; return False if there was none.

    Running jobs have the stack's DRAIN_S to finish. After STOP_S, or DRAIN_S and STOP_MARGIN_S if
    that is longer, the remaining processes are killed. Unfinished jobs continue with the next
    `restore up`. Raises DependencyUnavailable if a process cannot be ended.
    """
    owner = _owner(state_dir)
    if owner is not None:
        record = find_stack(state_dir)
        patience_s = max(STOP_S, record.drain_s + STOP_MARGIN_S) if record else STOP_S
        with suppress(psutil.NoSuchProcess):
            owner.terminate()
            below = owner.children(recursive=True)
            for each in (owner, *below, *processes_of(state_dir, ray_session(state_dir))):
                with suppress(psutil.NoSuchProcess):
                    each.resume()  # a suspended process could not stop
        wait_for_end([owner], patience_s)
        end_all(lambda: [owner] if is_alive(owner) else [])
    return end_leftovers(state_dir) or owner is not None


def _owner(state_dir: Path) -> psutil.Process | None:
    """Return the process that holds the folder, or None.

    Right after the lock was taken, its file may still name the previous holder, whose pid may have
    been reused. So the pid counts only if its process has the lock file open.
    """
    pid = holder_of(state_dir)
    lock = str((state_dir / LOCK).resolve())
    with suppress(psutil.NoSuchProcess):
        owner = psutil.Process(pid) if pid is not None else None
        if owner is not None and lock in (file.path for file in owner.open_files()):
            return owner
    return None


def end_leftovers(state_dir: Path) -> bool:
    """Kill the remaining processes of a stack that was killed; return whether there were any.

    Raises SetupError if a running stack holds the folder, and DependencyUnavailable if a process
    cannot be ended.
    """
    lock = state_dir / LOCK
    with holding(lock) if lock.exists() else nullcontext():
        any_left = end_all(partial(processes_of, state_dir, ray_session(state_dir)))
        (state_dir / _RECORD).unlink(missing_ok=True)
    return any_left
