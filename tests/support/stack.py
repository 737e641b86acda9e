"""Local stacks for tests: the product's temporary stack, and `restore up` in a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from serve_app.auth.scopes import USER_SCOPES
from serve_app.client import RestorationClient
from serve_app.local.record import find_stack
from serve_app.local.temporary import LocalStack, free_port, temporary_stack
from serve_app.schemas.workers import WorkerView
from tests.support.polling import wait_until

RESTORE = Path(sys.executable).with_name("restore")
START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 300
LEASE_S = 600  # for the shared stack: anything that happens sooner did not wait for a lease
REPORTED_S = 3  # A worker reports every second, for the first time when its engine is warm.


class Stack(LocalStack):
    """A running stack of the tests. `environ` is added to the environment of its commands."""

    def http(self, sub: str = "local", scopes: Iterable[str] = USER_SCOPES) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token(sub, scopes)}"}
        return httpx.Client(base_url=self.record.url, headers=headers, timeout=300, trust_env=False)

    def workers(self) -> dict[int, WorkerView]:
        """Return the workers that reported within REPORTED_S, by the port of their engine. A killed
        worker may stay listed for a while."""
        with RestorationClient(self.record.url, self.token(scopes=["admin"])) as client:
            roll = client.workers()
        since = roll.at - timedelta(seconds=REPORTED_S)
        return {
            int(worker.engine_url.rpartition(":")[2]): worker
            for worker in sorted(roll.workers, key=lambda worker: worker.seen_at)
            if worker.seen_at > since
        }

    def comfyui_url(self) -> str:
        """Return the URL of one engine of the stack, for requests that bypass the service."""
        port = min(path.name for path in (self.state_dir / "engines").iterdir())
        return f"http://127.0.0.1:{port}"

    def begin_up(self, port: str) -> subprocess.Popen[bytes]:
        """Start `restore up` without waiting for it."""
        return subprocess.Popen(
            [RESTORE, "up", "--port", port],
            env=_environ(self.state_dir, self.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def restore(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run_restore(self.state_dir, *arguments, check=check, environ=self.environ)


@dataclass(frozen=True)
class Terminal:
    """A stack whose `restore up` runs in the foreground and leads its own process group."""

    stack: Stack
    up: subprocess.Popen[bytes]

    def press_ctrl_c(self) -> int:
        """Send SIGINT to the whole group, like a terminal; return the exit status of `restore
        up`."""
        os.killpg(self.up.pid, signal.SIGINT)
        return self.up.wait(STOP_TIMEOUT_S)

    def says(self) -> str:
        return _output_of(self.stack).read_text()


def run_restore(
    state_dir: Path,
    *arguments: str,
    check: bool = True,
    environ: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the `restore` command on this state folder, and assert that it prints no traceback."""
    done = subprocess.run(
        [RESTORE, *arguments],
        env=_environ(state_dir, environ),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert done.returncode == 0 or not check, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def _environ(state_dir: Path, environ: Mapping[str, str] | None) -> dict[str, str]:
    own = {"COMFY_RESTORE_STATE": str(state_dir), "COLUMNS": "200"}
    return {**os.environ, **(environ or {}), **own}


@contextmanager
def running_stack(workers: int = 1, environ: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """Run a stack in a state folder of its own until the block ends."""
    with temporary_stack(workers, environ) as local:
        yield Stack(local.state_dir, local.environ)


@contextmanager
def running_in_terminal(environ: Mapping[str, str]) -> Iterator[Terminal]:
    """Run `restore up` in the foreground, in a state folder of its own, until the block ends."""
    with TemporaryDirectory(prefix="comfy-restore-", ignore_cleanup_errors=True) as folder:
        stack = Stack(Path(folder), environ)
        with _output_of(stack).open("wb") as output, _hearing_ctrl_c():
            up = subprocess.Popen(
                [RESTORE, "up", "--port", str(free_port())],
                env=_environ(stack.state_dir, environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_until(lambda: find_stack(stack.state_dir) or up.poll() is not None)
            yield Terminal(stack, up)
        finally:
            stack.restore("down")
            up.wait()


@contextmanager
def _hearing_ctrl_c() -> Iterator[None]:
    """Make processes started in the block receive SIGINT. A shell ignores it for its background
    jobs, and their children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _output_of(stack: Stack) -> Path:
    return stack.state_dir / "terminal.log"
