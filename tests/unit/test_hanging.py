"""A test that hangs fails by itself, and its report shows where it waited."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests.support.hanging

pytestmark = pytest.mark.minutes(5)  # this file starts another pytest

ROOT = Path(tests.support.hanging.__file__).parents[1]
HANGING = """
import asyncio, threading

async def waits_for_ever():
    await asyncio.Event().wait()

async def test_task():
    await waits_for_ever()

def test_thread():
    threading.Event().wait()

async def test_next():
    await asyncio.sleep(0)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return pytest's report on a file with two tests that hang, with a limit of a second."""
    folder = tmp_path_factory.mktemp("hanging")
    (folder / "unit").mkdir()
    (folder / "unit" / "test_hanging.py").write_text(HANGING)
    options = [
        "-p",
        "tests.support.hanging",
        "-o",
        "asyncio_mode=auto",
        "--timeout=1",
        "-rA",
        "--tb=short",
    ]
    loops = ["-o", "asyncio_default_test_loop_scope=session", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *loops, "--rootdir", folder, folder],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def test_a_task_that_hangs_is_shown_with_its_line(report: str) -> None:
    assert "FAILED unit/test_hanging.py::test_task" in report
    assert "in waits_for_ever\n    await asyncio.Event().wait()" in report


def test_a_thread_that_hangs_is_shown_with_its_line(report: str) -> None:
    assert "FAILED unit/test_hanging.py::test_thread" in report
    assert "threading.Event().wait()" in report.partition("test_thread")[2]


def test_the_next_test_runs(report: str) -> None:
    assert "PASSED unit/test_hanging.py::test_next" in report
