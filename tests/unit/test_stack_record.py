"""Stacks started from outside."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restoration.errors import SetupError
from serve_app.local import record
from serve_app.local.record import StackRecord, wait_until_serving
from serve_app.local.temporary import LocalStack, temporary_stack


def test_a_stack_that_loses_its_first_ray_is_not_up_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record says so while it starts Ray again, so a waiting command keeps waiting."""
    up = StackRecord(4711, "http://127.0.0.1:8000", issuer=None, drain_s=1)
    records = iter([None, replace(up, lost="its raylet ended"), up])
    process: Any = SimpleNamespace(pid=up.pid, poll=lambda: None)
    monkeypatch.setattr(record, "find_stack", lambda _state_dir: next(records))
    monkeypatch.setattr(record, "START_POLL_S", 0)
    (tmp_path / "up.log").touch()
    assert wait_until_serving(process, tmp_path, lambda _line: None) == up


def test_a_temporary_stack_gets_its_settings_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder is the stack's own, also if the environment names another one."""
    monkeypatch.setenv("COMFY_RESTORE_STATE", "/elsewhere")
    started: list[dict[str, str]] = []

    def popen(_command: object, *, env: dict[str, str], **_options: object) -> SimpleNamespace:
        started.append(env)
        return SimpleNamespace(pid=4711, poll=lambda: None, wait=lambda: 0)

    up = StackRecord(4711, "http://127.0.0.1:8000")
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(record, "find_stack", lambda _state_dir: up)
    with temporary_stack(environ={"DRAIN_S": "4"}) as stack:
        assert started[0]["COMFY_RESTORE_STATE"] == str(stack.state_dir)
        assert started[0]["DRAIN_S"] == stack.environ["DRAIN_S"] == "4"
    assert not stack.state_dir.exists()


def test_a_stack_that_is_not_running_has_no_record(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=str(tmp_path)):
        _ = LocalStack(tmp_path).record
