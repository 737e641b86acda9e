"""The supervisor, tested on tiny programs: order, restarts, and the death of the supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from persistence.embedded.keeper import Pace
from persistence.embedded.service import Service
from persistence.embedded.supervisor import Supervisor
from restoration.errors import DependencyUnavailable
from tests.support.polling import wait_until

# Writes its starts and orderly stops to a journal, and creates a file when it is ready.
SERVER = """
import os, signal, sys
folder, name, ready = sys.argv[1:]
def note(word):
    with open(f"{folder}/journal", "a") as journal:
        journal.write(f"{name} {word}\\n")
def stop(*_):
    note("stops")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
note("starts")
if ready == "ready":
    with open(f"{folder}/{name}.draft", "w") as pid:
        pid.write(str(os.getpid()))
    os.rename(f"{folder}/{name}.draft", f"{folder}/{name}.ready")
while True:
    signal.pause()
"""
PYTHON = (sys.executable, "-I", "-S", "-c")
EAGER = Pace(liveness_s=0.05, missed_probes=4, first_backoff_s=0.02, start_attempts=2)

# A supervisor in its own process: `a` becomes ready, `b` only if asked to.
DRIVER = """
import sys
from pathlib import Path
from persistence.embedded.supervisor import Supervisor, exit_on_sigterm
from tests.integration.test_embedded_supervisor import tiny
folder, ready = sys.argv[1:]
services = [tiny(Path(folder), "a"), tiny(Path(folder), "b", ready=ready == "True")]
with exit_on_sigterm(), Supervisor(services, lambda name: Path(folder, name + ".log")):
    sys.stdin.read()
"""


def tiny(folder: Path, name: str, *, ready: bool = True) -> Service:
    answer = folder / f"{name}.ready"
    return Service(
        name=name,
        argv=(*PYTHON, SERVER, str(folder), name, "ready" if ready else "never"),
        cwd=folder,
        prepare=lambda: answer.unlink(missing_ok=True),
        probe=answer.exists,
        grace_s=120.0,
    )


def supervisor(folder: Path, *services: Service) -> Supervisor:
    return Supervisor(services, lambda name: folder / f"{name}.log", EAGER)


def journal(folder: Path) -> list[str]:
    file = folder / "journal"
    return file.read_text().splitlines() if file.exists() else []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def drive(folder: Path, *, ready: bool) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", DRIVER, str(folder), str(ready)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=root)


def test_starts_in_order_and_stops_in_reverse(tmp_path: Path) -> None:
    """Services start one after another and stop in reverse order; the block's end stops all."""
    with supervisor(tmp_path, tiny(tmp_path, "a"), tiny(tmp_path, "b")) as running:
        pids = running.pid("a"), running.pid("b")
        assert all(pid is not None and alive(pid) for pid in pids)
    assert journal(tmp_path) == ["a starts", "b starts", "b stops", "a stops"]
    assert running.pid("a") is None
    running.stop()  # a second stop is harmless


def test_a_service_that_dies_at_once_ends_the_start(tmp_path: Path) -> None:
    """The error has the end of the service's log, and services already started are stopped."""
    broken = Service(
        name="b",
        argv=(*PYTHON, "import sys; sys.exit('no such luck')"),
        cwd=tmp_path,
        probe=lambda: False,
    )
    with (
        pytest.raises(DependencyUnavailable, match=r"b did not become ready.*\n.*no such luck"),
        supervisor(tmp_path, tiny(tmp_path, "a"), broken),
    ):
        pytest.fail("started")
    assert journal(tmp_path) == ["a starts", "a stops"]


def test_a_failing_preparation_is_reported(tmp_path: Path) -> None:
    """The caller gets the error that `prepare` raised."""

    def prepare() -> None:
        raise OSError("no space left")

    service = Service(name="a", argv=("true",), cwd=tmp_path, prepare=prepare, probe=lambda: True)
    with (
        pytest.raises(DependencyUnavailable, match="no space left"),
        supervisor(tmp_path, service),
    ):
        pytest.fail("started")


def test_a_killed_service_is_started_again(tmp_path: Path) -> None:
    """Each kill -9 is followed by a new, ready process."""
    with supervisor(tmp_path, tiny(tmp_path, "a")) as running:
        for _ in range(3):
            old = running.pid("a")
            assert old is not None
            os.kill(old, signal.SIGKILL)
            wait_until(lambda old=old: running.pid("a") not in (None, old))  # type: ignore[misc]
            wait_until(lambda: running.answers("a"))
    assert journal(tmp_path) == ["a starts"] * 4 + ["a stops"]


def test_a_service_that_stops_answering_is_restarted(tmp_path: Path) -> None:
    """A running process that does not answer is replaced after several missed probes."""
    with supervisor(tmp_path, tiny(tmp_path, "a")) as running:
        old = running.pid("a")
        (tmp_path / "a.ready").unlink()
        wait_until(lambda: running.pid("a") not in (None, old))
        wait_until(lambda: running.answers("a"))
    assert journal(tmp_path) == ["a starts", "a stops", "a starts", "a stops"]


def test_a_few_missed_probes_are_forgiven(tmp_path: Path) -> None:
    """A busy machine answers late, so that only consecutive missed probes count."""
    answers = iter([True, False, False, False, True, False, False, False, True])
    looked_enough = threading.Event()

    def probe() -> bool:
        try:
            return next(answers)
        except StopIteration:
            looked_enough.set()
            return True

    service = Service(name="a", argv=("sleep", "1000"), cwd=tmp_path, probe=probe)
    with supervisor(tmp_path, service) as running:
        old = running.pid("a")
        assert looked_enough.wait(20)
        assert running.pid("a") == old


def test_what_will_not_stop_is_killed_with_its_children(tmp_path: Path) -> None:
    """After the grace period all descendants are killed, also those that left the session."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); child = os.fork()\n"
        "if not child and sys.platform == 'linux': os.setsid()\n"
        "if child: open('child', 'w').write(str(child)); os.rename('child', 'ready')\n"
        "while True: signal.pause()"
    )
    ready = tmp_path / "ready"
    stubborn = Service(
        name="a", argv=(*PYTHON, script), cwd=tmp_path, probe=ready.exists, grace_s=0.2
    )
    with supervisor(tmp_path, stubborn) as running:
        pids = [running.pid("a"), int(ready.read_text())]
    assert not any(pid is None or alive(pid) for pid in pids)


def test_the_thread_that_starts_may_end(tmp_path: Path) -> None:
    """A server is bound to the supervisor's process, not to the thread that started it."""
    running = supervisor(tmp_path, tiny(tmp_path, "a"))
    starter = threading.Thread(target=running.start)
    starter.start()
    starter.join()
    try:
        with pytest.raises(TimeoutError):
            wait_until(lambda: len(journal(tmp_path)) > 1, timeout_s=0.5)
    finally:
        running.stop()
    assert journal(tmp_path) == ["a starts", "a stops"]


def test_a_server_inherits_neither_environment_nor_ignored_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server gets none of our secrets, and handles SIGINT even if its supervisor ignores it."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ours")
    script = "import os, time; print(sorted(os.environ), flush=True); time.sleep(1000)"
    service = Service(
        name="a",
        argv=(*PYTHON, script),
        cwd=tmp_path,
        probe=lambda: "PATH" in (tmp_path / "a.log").read_text(),
        stop_signal=signal.SIGINT,
        grace_s=600,
    )
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with supervisor(tmp_path, service):
            assert "AWS" not in (tmp_path / "a.log").read_text()
            began = time.monotonic()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - began < 300


def test_sigterm_during_the_start_is_not_lost(tmp_path: Path) -> None:
    """A supervisor that gets SIGTERM while a service starts stops all services."""
    with drive(tmp_path, ready=False) as driver:
        wait_until(lambda: "b starts" in journal(tmp_path))
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(300) == 128 + signal.SIGTERM
    assert journal(tmp_path) == ["a starts", "b starts", "b stops", "a stops"]


def test_nothing_survives_a_killed_supervisor(tmp_path: Path) -> None:
    """When the supervisor is killed, its servers are killed at once."""
    with drive(tmp_path, ready=True) as driver:
        wait_until((tmp_path / "b.ready").exists)
        servers = [int((tmp_path / f"{name}.ready").read_text()) for name in "ab"]
        assert all(map(alive, servers))
        driver.kill()
        wait_until(lambda: not any(map(alive, servers)))
    assert journal(tmp_path) == ["a starts", "b starts"]
