"""Where the local stack of a state folder is, and how to start and stop it from outside.

Nothing heavy is imported here: every command looks here first.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from persistence.embedded.state import holder_of, write_private
from restoration.errors import DependencyUnavailable, SetupError
from restoration.webhooks import SECRET_PREFIX

STOP_TIMEOUT_S = 120.0
_RECORD = "stack.json"
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class StackOptions:
    workers: int = 1
    port: int = 8000


@dataclass(frozen=True, slots=True)
class StackRecord:
    """A stack that serves: its own address, Ray's, its issuer's if it has one of its own, and
    where Prometheus finds its metrics.

    `pid` is the process of `restore up`, whose end ends all of it.
    """

    pid: int
    url: str
    ray_address: str
    issuer: str | None
    metrics: str | None = None


def find_stack(state_dir: Path) -> StackRecord | None:
    """The stack of this state folder, if one serves."""
    try:
        record = json.loads((state_dir / _RECORD).read_bytes())
    except FileNotFoundError:
        return None
    # one that was killed has left its record behind
    return StackRecord(**record) if record["pid"] == holder_of(state_dir) else None


@contextmanager
def recorded(state_dir: Path, record: StackRecord) -> Iterator[None]:
    """Let others find this stack during the block."""
    path = state_dir / _RECORD
    write_private(path, json.dumps(asdict(record)))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def demand_down(state_dir: Path) -> None:
    """Raise SetupError if a stack of this state folder is up, or on its way."""
    if (pid := holder_of(state_dir)) is not None:
        raise SetupError(f"a stack is up already in {state_dir} (pid {pid}): `restore down` first")


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
    command = [sys.executable, "-m", "serve_app.cli", "up"]
    command += ["--workers", str(options.workers), "--port", str(options.port)]
    with log_path.open("wb") as log:
        stack = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    while stack.poll() is None:
        record = find_stack(state_dir)
        if record is not None and record.pid == stack.pid:
            return record
        progress(_last_line(log_path) or "starting")
        time.sleep(_POLL_S)
    last_words = _last_line(log_path).removeprefix("error: ")
    raise SetupError(f"the stack did not start: {last_words}; see {log_path}")


def _last_line(path: Path) -> str:
    return (path.read_text(errors="replace").rstrip().splitlines() or [""])[-1]


def stop_stack(state_dir: Path) -> bool:
    """Stop the stack of this state folder and wait for its end; False when there was none.

    Raises DependencyUnavailable when it does not end.
    """
    pid = holder_of(state_dir)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _is_alive(pid):
        if time.monotonic() > deadline:
            raise DependencyUnavailable(
                f"the stack (pid {pid}) has not stopped after {STOP_TIMEOUT_S:.0f} s"
            )
        time.sleep(_POLL_S)
    return True


def _is_alive(pid: int) -> bool:
    """Whether the process still runs; the lock on the folder goes a little before the process."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")  # Linux; a zombie has ended, whoever forgot to reap it
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
