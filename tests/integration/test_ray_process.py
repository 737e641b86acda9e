"""The handling of Ray's process by `restore up`, tested with fake programs."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from restoration.errors import DependencyUnavailable
from restoration.settings import STACK_MARK
from serve_app.local import ray_process
from serve_app.local.processes import is_alive
from serve_app.local.ray_process import RayLost, RayProcess
from serve_app.local.record import StackOptions, ray_session

READY = """
    import json, os, subprocess, sys
    report = sys.argv[sys.argv.index("--report") + 1]
    away = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True
    )
    ray = {"session_dir": f"/tmp/ray/{away.pid}", "gcs": "x:1", "metrics": "m", "ready": True}
    with open(report + ".new", "w") as file:
        json.dump(ray, file)
    os.rename(report + ".new", report)
"""


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(STACK_MARK, str(tmp_path))
    return tmp_path


@contextmanager
def running(state_dir: Path, monkeypatch: pytest.MonkeyPatch, *parts: str) -> Iterator[RayProcess]:
    text = "".join(textwrap.dedent(part) for part in parts)
    monkeypatch.setattr(ray_process, "PROGRAM", (sys.executable, "-c", text))
    with RayProcess(state_dir, StackOptions(), drain_s=0) as ray:
        yield ray


def test_a_ray_that_is_lost_says_why_and_leaves_nothing(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last line is the reason; all processes that it started end, even in other sessions."""
    told = state_dir / "told"
    end = f"""
        while not os.path.exists({str(told)!r}):
            pass
        print("error: its raylet ended", flush=True)
        os._exit(3)
    """
    with running(state_dir, monkeypatch, READY, end) as ray:
        assert ray.wait_until_ready(lambda: True).gcs == "x:1"
        session = ray_session(state_dir)
        assert session is not None
        away = psutil.Process(int(session.name))
        assert is_alive(away)
        told.touch()
        with pytest.raises(RayLost, match=r"^its raylet ended$"):
            ray.wait_until_lost()
    assert not is_alive(away)


def test_a_ray_that_is_killed_is_lost(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an output line the exit status is the reason, and the error names the log."""
    end = "os.kill(os.getpid(), 9)"
    with running(state_dir, monkeypatch, READY, end) as ray:
        with pytest.raises(RayLost, match=r"its process was killed by signal 9 .*; see .*ray\.log"):
            ray.wait_until_lost()


def test_a_ray_that_does_not_start_is_lost(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another start may succeed, so that this does not end the stack."""
    fail = 'import sys; sys.stderr.write("error: Ray did not start: no port\\n"); sys.exit(3)'
    with running(state_dir, monkeypatch, fail) as ray:
        with pytest.raises(RayLost, match="Ray did not start: no port"):
            ray.wait_until_ready(lambda: True)


def test_a_service_that_does_not_start_is_an_error(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another start would fail too."""
    fail = 'import sys; sys.exit("error: the service did not start: no model")'
    with running(state_dir, monkeypatch, fail) as ray:
        with pytest.raises(DependencyUnavailable, match="the service did not start: no model; see"):
            ray.wait_until_ready(lambda: True)


def test_what_was_reported_before_is_not_believed(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report by the previous Ray does not make the next one ready."""
    (state_dir / "ray.json").write_text(
        '{"session_dir": "/no/session", "gcs": "old:1", "metrics": "m", "ready": true}'
    )
    with running(state_dir, monkeypatch, "import sys; sys.exit(3)") as ray:
        with pytest.raises(RayLost):
            ray.wait_until_ready(lambda: True)
