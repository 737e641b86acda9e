"""Programs under a guard: their sessions, output and end. Engine trees have tests of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from restoration.processes import child, guard
from restoration.processes.child import ExitInfo, LoggedProcess, Program, run
from serve_app.local.processes import is_alive, wait_for_end

PYTHON = (sys.executable, "-I", "-S", "-c")
DEADLINE_S = 300


def program(folder: Path, script: str) -> Program:
    return Program(argv=(*PYTHON, script), cwd=folder, env={"PATH": os.defpath})


def ends(process: psutil.Process) -> bool:
    wait_for_end([process], DEADLINE_S)
    return not is_alive(process)


@pytest.fixture
def ended() -> threading.Event:
    return threading.Event()


def start(folder: Path, script: str, ended: threading.Event) -> LoggedProcess:
    return LoggedProcess(program(folder, script), folder / "a.log", lambda _exit: ended.set())


def test_a_program_shares_neither_session_nor_group_with_its_owner(
    tmp_path: Path, ended: threading.Event
) -> None:
    """A Ctrl-C in the owner's terminal does not reach it."""
    process = start(tmp_path, "import signal; signal.pause()", ended)
    assert os.getsid(process.pid) != os.getsid(0)
    assert os.getpgid(process.pid) == process.pid
    process.end(DEADLINE_S)
    assert process.exit == ExitInfo(-signal.SIGTERM)


def test_the_end_of_a_program_is_reported_with_its_output(
    tmp_path: Path, ended: threading.Event
) -> None:
    """The tail has the output of this process only, and ending it again is harmless."""
    start(tmp_path, "print('before')", ended)
    assert ended.wait(DEADLINE_S)
    ended.clear()
    process = start(tmp_path, "import sys; print('now', flush=True); sys.exit(3)", ended)
    assert ended.wait(DEADLINE_S)
    assert str(process.exit) == "exited with status 3"
    assert process.log_tail() == "now"
    process.end(0)


def test_a_large_log_is_rotated_before_the_start(
    tmp_path: Path, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous log is kept, and a small log is continued."""
    monkeypatch.setattr(child, "LOG_LIMIT_BYTES", 5)
    (tmp_path / "a.log").write_text("older\n")
    for word in ("old", "new"):
        start(tmp_path, f"print('{word}')", ended)
        assert ended.wait(DEADLINE_S)
        ended.clear()
    assert (tmp_path / "a.log").read_text() == "old\nnew\n"
    assert (tmp_path / "a.log.1").read_text() == "older\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")
def test_a_program_ends_with_its_guard(tmp_path: Path, ended: threading.Event) -> None:
    """A killed guard takes the program along, and the owner is informed."""
    process = start(tmp_path, "import signal; signal.pause()", ended)
    running = psutil.Process(process.pid)
    running.parent().kill()
    assert ended.wait(DEADLINE_S)
    assert process.exit == ExitInfo(None)
    assert ends(running)


@contextmanager
def lifeline(command: list[str]) -> Iterator[tuple[socket.socket, subprocess.Popen[str]]]:
    """Start a guard by its command, which gets the descriptor as its last argument."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(DEADLINE_S)
        with theirs:
            process = subprocess.Popen(
                [each.replace("LIFELINE", str(theirs.fileno())) for each in command],
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(theirs.fileno(),),
            )
        with process:
            yield ours, process


def test_a_request_may_arrive_in_pieces(tmp_path: Path) -> None:
    """The end of a number is no second request: a 0 would kill at once."""
    pausing = program(tmp_path, "import signal; signal.pause()")
    guarded = replace(pausing, stop_signal=signal.SIGCONT).guarded(-7)
    command = ["LIFELINE" if each == "-7" else each for each in guarded]
    with lifeline(command) as (owner, _):
        assert owner.recv(256)
        owner.sendall(b"30")
        time.sleep(0.3)
        owner.sendall(b"0.0\n")
        owner.settimeout(0.5)
        with pytest.raises(TimeoutError):
            owner.recv(256)
        owner.sendall(b"0\n")
        owner.settimeout(DEADLINE_S)
        assert owner.recv(256) == b"-9\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a group of zombies refuses signals")
def test_a_guard_gives_up_on_processes_that_it_may_not_signal() -> None:
    """A descendant that changed its account would otherwise keep the owner waiting for ever."""
    script = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(guard.__file__)!r})
import guard
def refuse(pid, number): raise PermissionError
os.kill = refuse
guard.REFUSED_S = 0.2
pause = [sys.executable, "-c", "import signal; signal.pause()"]
guard.main(["--lifeline", "LIFELINE", "--stop-signal", "15", "--", *pause])
"""
    with lifeline([sys.executable, "-c", script]) as (owner, process):
        pid = owner.recv(256).decode().strip()
        owner.sendall(b"0\n")
        assert owner.recv(256) == b""
        assert process.stderr is not None
        assert process.stderr.read() == f"may not end processes of other accounts: {pid}\n"


def test_a_return_code_is_kept_where_children_are_ignored() -> None:
    """An inherited SIG_IGN lets the kernel drop it, if the program ends before the guard waits."""
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {os.path.dirname(guard.__file__)!r})
import guard
watch = guard.watch_signals
def watch_late():
    time.sleep(1)
    return watch()
guard.watch_signals = watch_late
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
guard.main(["--lifeline", "LIFELINE", "--stop-signal", "15", "--", "false"])
"""
    with lifeline([sys.executable, "-c", script]) as (owner, _):
        assert owner.recv(256)
        assert owner.recv(256) == b"1\n"


def test_run_passes_standard_input_and_raises_with_the_output(tmp_path: Path) -> None:
    """A failure raises an error that has the program's error output."""
    script = "import sys; text = sys.stdin.read(); sys.exit(text if text != 'right' else None)"
    run(program(tmp_path, script), DEADLINE_S, "right")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(program(tmp_path, script), DEADLINE_S, "wrong")
    assert (failed.value.returncode, failed.value.stderr) == (1, "wrong\n")


def test_run_ends_a_program_that_takes_too_long(tmp_path: Path) -> None:
    """The program is killed."""
    pid = tmp_path / "pid"
    script = f"import os, signal; open({str(pid)!r}, 'w').write(str(os.getpid())); signal.pause()"
    with pytest.raises(subprocess.TimeoutExpired):
        run(program(tmp_path, script), timeout_s=5)
    with suppress(psutil.NoSuchProcess):
        assert ends(psutil.Process(int(pid.read_text())))
