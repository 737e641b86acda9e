"""A stack started from outside."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve_app.local import record
from serve_app.local.record import StackOptions, StackRecord, start_detached


def test_a_stack_that_loses_its_first_ray_is_not_up_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record says so while it starts Ray again, so a waiting command keeps waiting."""
    up = StackRecord(4711, "http://127.0.0.1:8000", issuer=None, drain_s=1)
    records = iter([None, replace(up, lost="its raylet ended"), up])
    process = SimpleNamespace(pid=up.pid, poll=lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_args, **_options: process)
    monkeypatch.setattr(record, "find_stack", lambda _state_dir: next(records))
    monkeypatch.setattr(record, "START_POLL_S", 0)
    assert start_detached(tmp_path, StackOptions(), lambda _line: None) == up
