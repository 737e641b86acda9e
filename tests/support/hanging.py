"""A pytest plugin: limit the time of each test, and report what a hanging test waits for."""

from __future__ import annotations

import asyncio
import linecache
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from types import CoroutineType
from typing import Any

import pytest
from pytest_timeout import get_env_settings

# Multiples of pytest's option `timeout`: a minute, unless PYTEST_TIMEOUT or --timeout changes it.
FOLDERS = {"unit": 1, "contracts": 5, "security": 5, "integration": 10}
WHOLE_STACK = 20


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout reads the marker
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Limit a test by its marker `minutes`, or else by its folder and fixtures.

    Where more processes want to run than there are cores, the limit is as many times longer.
    """
    marker = item.get_closest_marker("minutes")
    minutes = marker.args[0] if marker else _usual_minutes(item)
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    limit_s = get_env_settings(item.config).timeout * minutes * busy
    item.add_marker(pytest.mark.timeout(limit_s))
    return (yield)


def _usual_minutes(item: pytest.Item) -> int:
    if "stack" in getattr(item, "fixturenames", ()):
        return WHOLE_STACK
    folders = Path(item.nodeid.partition("::")[0]).parts
    return next((FOLDERS[name] for name in folders if name in FOLDERS), WHOLE_STACK)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the tasks of an interrupted event loop to the report: the traceback ends in the loop."""
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(pytest.fail.Exception):
        for entry in call.excinfo.traceback:
            loop = entry.frame.f_locals.get("self")
            if isinstance(loop, asyncio.AbstractEventLoop):
                tasks = "\n".join(map(_describe, asyncio.all_tasks(loop)))
                report.sections.append(("Tasks of the event loop", tasks))
                break
    return report


def _describe(task: asyncio.Task[Any]) -> str:
    return "\n".join([f"{task.get_name()}: {task.get_coro()}", *_awaits(task.get_coro())])


def _awaits(awaited: object) -> Iterator[str]:
    """Yield the line at which each coroutine of a suspended task waits, the outermost first."""
    while isinstance(awaited, CoroutineType) and awaited.cr_frame is not None:
        file, line = awaited.cr_code.co_filename, awaited.cr_frame.f_lineno
        yield f'  File "{file}", line {line}, in {awaited.cr_code.co_qualname}'
        yield f"    {linecache.getline(file, line).strip()}"
        awaited = awaited.cr_await
