"""`restore down` on fake stacks ends all of their processes in any state, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from persistence.embedded.state import holder_of
from restoration.errors import SetupError
from serve_app.local import record
from serve_app.local.processes import is_alive, mark
from serve_app.local.record import (
    RayReport,
    StackRecord,
    demand_down,
    end_leftovers,
    report_path,
    stop_stack,
)
from tests.support.polling import wait_until

# The owner of a state folder, with a child and a detached grandchild, like an engine.
OWNER = """
    import os, signal, subprocess, sys, threading
    from pathlib import Path
    from persistence.embedded.state import StateDir

    signal.signal(signal.SIGTERM, getattr(signal, sys.argv[2]))
    with StateDir.locked(Path(sys.argv[1])):
        sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
        below = subprocess.Popen(sleep, start_new_session=True)
        if os.fork() == 0:
            away = subprocess.Popen(sleep, start_new_session=True)
            print(below.pid, away.pid, flush=True)
            os._exit(0)
        threading.Event().wait()
"""


class Started:
    """Starts processes, and kills those that are left at the end of the test."""

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo

    def program(
        self, text: str, *arguments: str, environ: dict[str, str], cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(text), *arguments],
            env={**os.environ, **environ},
            cwd=cwd,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._undo.callback(process.wait)
        self._undo.callback(process.kill)
        assert process.stdout is not None
        self._undo.callback(process.stdout.close)
        return process

    def sleeper(self, environ: dict[str, str], cwd: Path | None = None) -> psutil.Process:
        started = self.program(
            "import time; print(flush=True); time.sleep(1000)", environ=environ, cwd=cwd
        )
        assert started.stdout is not None
        started.stdout.readline()
        return psutil.Process(started.pid)

    def stack(self, state_dir: Path, on_sigterm: str) -> list[psutil.Process]:
        """Start a stack, and return its owner, followed by the processes that it started."""
        owner = self.program(OWNER, str(state_dir), on_sigterm, environ=mark(state_dir))
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        return [psutil.Process(pid) for pid in (owner.pid, *pids)]


@pytest.fixture
def started() -> Iterator[Started]:
    with ExitStack() as undo:
        yield Started(undo)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill an owner that does not stop almost at once."""
    monkeypatch.setattr(record, "STOP_S", 0.5)


@pytest.mark.parametrize("on_sigterm", ["SIG_DFL", "SIG_IGN"])
@pytest.mark.parametrize("suspended", [False, True])
def test_down_ends_a_stack_that_stops_badly(
    started: Started, tmp_path: Path, on_sigterm: str, suspended: bool
) -> None:
    """The owner may ignore SIGTERM, end without its children, or be suspended with them."""
    processes = started.stack(tmp_path, on_sigterm)
    for each in processes if suspended else []:
        each.suspend()
    assert stop_stack(tmp_path)
    assert [each for each in processes if is_alive(each)] == []
    assert not stop_stack(tmp_path)


def test_down_ends_what_a_dead_owner_has_left(started: Started, tmp_path: Path) -> None:
    """The children, one of them suspended, and the record outlive a dead owner."""
    owner, *left = started.stack(tmp_path, "SIG_DFL")
    record = StackRecord(owner.pid, "http://127.0.0.1:1")
    (tmp_path / "stack.json").write_text(json.dumps(asdict(record)))
    owner.kill()
    wait_until(lambda: not is_alive(owner))
    left[0].suspend()
    assert [is_alive(each) for each in left] == [True, True]
    assert stop_stack(tmp_path)
    assert [each for each in left if is_alive(each)] == []
    assert not (tmp_path / "stack.json").exists()


def test_down_ends_a_process_that_wrote_a_title_over_its_environment(
    started: Started, tmp_path: Path
) -> None:
    """It is recognised by its working folder, or by an open file in Ray's folder."""
    session = tmp_path / "ray" / "session_1"
    state_dir = tmp_path / "state"
    for folder in (session, state_dir):
        folder.mkdir(parents=True)
    (session / "raylet.out").touch()
    report = RayReport(str(session), "127.0.0.1:1", "http://127.0.0.1:2/metrics")
    report_path(state_dir).write_text(json.dumps(asdict(report)))
    bare = "import os, sys; os.execve(sys.executable, [sys.executable, '-c', sys.argv[1]], {})"
    sleep = "import time; print(flush=True); time.sleep(1000)"
    opened = f"kept = open({str(session / 'raylet.out')!r}); {sleep}"
    processes = []
    for program, cwd in ((sleep, state_dir), (opened, tmp_path), (sleep, tmp_path)):
        process = started.program(bare, program, environ={}, cwd=cwd)
        assert process.stdout is not None
        process.stdout.readline()
        processes.append(psutil.Process(process.pid))
    assert stop_stack(state_dir)
    assert [is_alive(each) for each in processes] == [False, False, True]


def test_down_spares_every_other_process(started: Started, tmp_path: Path) -> None:
    """Another stack survives, and so does a shell that names this stack's folder and works in
    it."""
    own, other = tmp_path / "state", tmp_path / "state-of-another"
    own.mkdir()
    ours = started.stack(own, "SIG_DFL")
    others = started.stack(other, "SIG_DFL")
    others.append(started.sleeper({"COMFY_RESTORE_STATE": str(own)}, cwd=own))
    assert stop_stack(own)
    assert [each for each in ours if is_alive(each)] == []
    assert [each for each in others if not is_alive(each)] == []
    assert stop_stack(other)


def test_up_ends_what_a_dead_stack_has_left_and_nothing_of_a_living_one(
    started: Started, tmp_path: Path
) -> None:
    """`restore up` removes leftovers before it starts, but leaves a locked folder alone."""
    owner, *below = started.stack(tmp_path, "SIG_DFL")
    with pytest.raises(SetupError, match=f"pid {owner.pid}"):
        demand_down(tmp_path)
    with pytest.raises(SetupError, match=f"pid {owner.pid}"):
        end_leftovers(tmp_path)
    assert [each for each in (owner, *below) if not is_alive(each)] == []
    owner.kill()
    wait_until(lambda: holder_of(tmp_path) is None)
    assert end_leftovers(tmp_path)
    assert [each for each in below if is_alive(each)] == []


def test_a_pid_that_the_lock_names_wrongly_is_not_signalled(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an instant the lock file names the previous holder, whose pid may have been reused."""
    bystander = started.sleeper({})
    monkeypatch.setattr(record, "holder_of", lambda _folder: bystander.pid)
    assert not stop_stack(tmp_path)
    assert is_alive(bystander)
