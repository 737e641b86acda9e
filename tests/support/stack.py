"""A local stack for tests, started by `restore up`, and the ways to reach it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import httpx

from serve_app.auth.local_issuer import LOCAL_AUDIENCE, mint_token
from serve_app.auth.scopes import USER_SCOPES
from serve_app.client import RestorationClient
from serve_app.local.record import StackRecord, find_stack, issuer_folder
from serve_app.schemas.workers import WorkerView
from tests.e2e.stack_processes import wait_until

RESTORE = Path(sys.executable).with_name("restore")
START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 300
LEASE_S = 600  # for the shared stack: anything that happens sooner did not wait for a lease
REPORTED_S = 3  # A worker reports every second, for the first time when its engine is warm.


@dataclass(frozen=True)
class Stack:
    """A running stack. `environ` is added to the environment of its commands."""

    state_dir: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def record(self) -> StackRecord:
        record = find_stack(self.state_dir)
        assert record is not None, "the stack is not up"
        return record

    def token(
        self,
        sub: str = "tester",
        scopes: Iterable[str] = USER_SCOPES,
        claims: Mapping[str, object] | None = None,
    ) -> str:
        assert self.record.issuer is not None
        keys = issuer_folder(self.state_dir)
        return mint_token(
            keys, self.record.issuer, LOCAL_AUDIENCE, sub, scopes, more_claims=claims or {}
        )

    def client(self, sub: str = "tester") -> RestorationClient:
        return RestorationClient(self.record.url, self.token(sub))

    def http(self, sub: str = "tester", scopes: Iterable[str] = USER_SCOPES) -> httpx.Client:
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
        return _said(self.stack.state_dir).read_text()


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
def running_stack(*options: str, environ: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """Run `restore up` in a state folder of its own, and `restore down` at the end."""
    with _state_dir() as folder:
        stack = Stack(folder, environ or {})
        stack.restore("up", "--detach", "--port", str(free_port()), *options)
        try:
            yield stack
        finally:
            stack.restore("down")


@contextmanager
def running_in_terminal(environ: Mapping[str, str]) -> Iterator[Terminal]:
    """Run `restore up` in the foreground, in a state folder of its own, until the block ends."""
    with _state_dir() as folder, _said(folder).open("wb") as said:
        with _hearing_ctrl_c():
            up = subprocess.Popen(
                [RESTORE, "up", "--port", str(free_port())],
                env=_environ(folder, environ),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        terminal = Terminal(Stack(folder, environ), up)
        try:
            wait_until(lambda: find_stack(folder) or up.poll() is not None)
            yield terminal
        finally:
            terminal.stack.restore("down")
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


def _said(state_dir: Path) -> Path:
    return state_dir / "terminal.log"


@contextmanager
def _state_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="comfy-restore-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
