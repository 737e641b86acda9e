"""Where the local stack of a state folder is, and how to start and stop it from outside.

Nothing heavy is imported here: every command looks here first.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil

from persistence.embedded.state import LOCK, holder_of, holding, write_private
from restoration.errors import SetupError
from restoration.webhooks.messages import SECRET_PREFIX
from serve_app.local.processes import end_all, is_alive, mark, processes_of, wait_for_end

STOP_S = 22.0  # for an orderly stop; what is left then is killed
STOP_MARGIN_S = 7.0  # of it, beyond the time that running jobs have
START_POLL_S = 0.1
# Of the process of Ray: it failed for a reason that stays, or has lost its Ray.
FAILED_STATUS, LOST_STATUS = 1, 3
_RECORD = "stack.json"
_REPORT = "ray.json"


@dataclass(frozen=True, slots=True)
class StackOptions:
    workers: int = 1
    port: int = 8000


@dataclass(frozen=True, slots=True)
class StackRecord:
    """A stack that serves: its own address, Ray's, its issuer's if it has one of its own, and
    where Prometheus finds its metrics.

    `pid` is the process of `restore up`, whose end ends all of it. `lost` says why there is no
    Ray, while it is started again; `drain_s` is how long running jobs may go on in a stop.
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
    """Where the stack's Ray has its files, its address, and its metrics for Prometheus.

    The service on it is up once it is `ready`.
    """

    session_dir: str
    gcs: str
    metrics: str
    ready: bool = False


def find_stack(state_dir: Path) -> StackRecord | None:
    """The stack of this state folder, if one serves, or did until it lost its Ray."""
    try:
        record = json.loads((state_dir / _RECORD).read_bytes())
    except FileNotFoundError:
        return None
    # one that was killed has left its record behind
    return StackRecord(**record) if record["pid"] == holder_of(state_dir) else None


@contextmanager
def recording(state_dir: Path) -> Iterator[Callable[[StackRecord], None]]:
    """Let others find the stack that was recorded last, until the block ends."""
    path = state_dir / _RECORD
    try:
        yield lambda record: write_private(path, json.dumps(asdict(record)))
    finally:
        path.unlink(missing_ok=True)


def report_path(state_dir: Path) -> Path:
    """Where the process of Ray writes its RayReport."""
    return state_dir / _REPORT


def find_report(state_dir: Path) -> RayReport | None:
    """What the newest Ray of this folder has reported; it need not run any more."""
    try:
        return RayReport(**json.loads(report_path(state_dir).read_bytes()))
    except FileNotFoundError:
        return None


def ray_session(state_dir: Path) -> Path | None:
    """The folder of the newest Ray's own files."""
    report = find_report(state_dir)
    return Path(report.session_dir) if report else None


def demand_down(state_dir: Path) -> None:
    """Raise SetupError if a stack of this state folder is up, or on its way."""
    if (pid := holder_of(state_dir)) is not None:
        stack = find_stack(state_dir)
        trouble = f", and starts its Ray again ({stack.lost})" if stack and stack.lost else ""
        raise SetupError(
            f"a stack is up already in {state_dir} (pid {pid}){trouble}: `restore down` first"
        )


def issuer_folder(state_dir: Path) -> Path:
    return state_dir / "issuer"


def webhook_secret(state_dir: Path) -> str:
    """What the local stack signs its webhooks with; made when first asked for, and kept."""
    path = state_dir / "webhook-secret"
    if not path.exists():
        write_private(path, SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode())
    return path.read_text()


def start_detached(
    state_dir: Path, options: StackOptions, progress: Callable[[str], None]
) -> StackRecord:
    """Start the stack as a process of its own and return once it serves.

    Raises SetupError with its last words when it ends instead.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    log_path = state_dir / "up.log"
    command = [sys.executable, "-m", "serve_app.cli.main", "up"]
    command += ["--workers", str(options.workers), "--port", str(options.port)]
    with log_path.open("wb") as log:
        stack = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **mark(state_dir)},
            start_new_session=True,
        )
    while stack.poll() is None:
        record = find_stack(state_dir)
        # one that lost its Ray before it ever served tries again
        if record is not None and record.pid == stack.pid and record.lost is None:
            return record
        progress(_last_line(log_path) or "starting")
        time.sleep(START_POLL_S)
    last_words = _last_line(log_path).removeprefix("error: ")
    raise SetupError(f"the stack did not start: {last_words}; see {log_path}")


def _last_line(path: Path) -> str:
    return (path.read_text(errors="replace").rstrip().splitlines() or [""])[-1]


def stop_stack(state_dir: Path) -> bool:
    """End the stack of this state folder, in whatever state it is; False when there was none.

    In order if it can: running jobs may go on for the stack's DRAIN_S. After STOP_S, or DRAIN_S
    and some seconds where that is longer, what is left is killed. Jobs that wait or run go on with
    the next `restore up`. Raises DependencyUnavailable for what cannot be ended.
    """
    owner = _owner(state_dir)
    if owner is not None:
        record = find_stack(state_dir)
        patience_s = max(STOP_S, record.drain_s + STOP_MARGIN_S) if record else STOP_S
        _ask_to_stop(owner, state_dir)
        wait_for_end([owner], patience_s)
        end_all(lambda: [owner] if is_alive(owner) else [])
    return end_leftovers(state_dir) or owner is not None


def _owner(state_dir: Path) -> psutil.Process | None:
    """Return the process that holds the folder.

    For an instant after the lock was taken its file names the holder before, whose pid may be
    another process's by now: it is believed only of a process that has the file open.
    """
    pid = holder_of(state_dir)
    lock = str((state_dir / LOCK).resolve())
    with suppress(psutil.NoSuchProcess):
        owner = psutil.Process(pid) if pid is not None else None
        if owner is not None and lock in (file.path for file in owner.open_files()):
            return owner
    return None


def _ask_to_stop(owner: psutil.Process, state_dir: Path) -> None:
    with suppress(psutil.NoSuchProcess):
        owner.terminate()
        below = owner.children(recursive=True)
        for each in (owner, *below, *processes_of(state_dir, ray_session(state_dir))):
            with suppress(psutil.NoSuchProcess):
                each.resume()  # one that is suspended could not stop


def end_leftovers(state_dir: Path) -> bool:
    """Kill what a stack that was killed has left behind; whether there was anything.

    Raises SetupError if a stack holds the folder, DependencyUnavailable for what cannot be ended.
    """
    lock = state_dir / LOCK
    with holding(lock) if lock.exists() else nullcontext():
        any_left = end_all(partial(processes_of, state_dir, ray_session(state_dir)))
        (state_dir / _RECORD).unlink(missing_ok=True)
    return any_left
