"""`make check` fails on weaknesses that pip-audit finds, and not without a network."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import httpx
import pytest

from tests.support import audit

CLEAN = {"name": "h11", "version": "0.16.0", "vulns": []}
UNKNOWN = {"name": "ours", "skip_reason": "not found on PyPI"}
WEAK = {
    "name": "jinja2",
    "version": "2.10",
    "vulns": [{"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"]}],
}
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Set the answer to the probe; an exception is raised."""
    answer: dict[str, Any] = {"vulnerabilities": [{}]}

    def get(url: str, **_options: object) -> httpx.Response:
        if "error" in answer:
            raise httpx.ConnectError("no route")
        return httpx.Response(200, json=answer, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    return answer


def _report(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    def run(*_command: object, **_options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, output, "")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("packages", "status", "said"),
    [
        ([CLEAN, UNKNOWN], 0, "nothing is known against 1 packages, 1 are not known"),
        ([CLEAN, WEAK], 1, "jinja2 2.10: PYSEC-2019-217, fixed in 2.10.1"),
    ],
)
def test_a_known_weakness_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    packages: list[dict[str, object]],
    status: int,
    said: str,
) -> None:
    """Each weakness gets one line with the version that fixes it."""
    _report(monkeypatch, json.dumps({"dependencies": packages}))
    assert audit.main() == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("answer", [{"error": True}, {"vulnerabilities": []}, {}])
def test_no_database_is_said_and_passes(
    database: dict[str, Any], capsys: Capture, answer: dict[str, Any]
) -> None:
    """An unreachable database, or a mirror that lists no weaknesses, passes with a message."""
    database.clear()
    database.update(answer)
    assert audit.main() == 0
    assert "did not run" in capsys.readouterr().err


def test_an_audit_that_the_database_leaves_is_said_and_passes(
    database: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Without a report the audit passes with a message."""

    def run(*_command: object, **_options: object) -> subprocess.CompletedProcess[str]:
        database["error"] = True
        return subprocess.CompletedProcess([], 1, "", "no route")

    monkeypatch.setattr(subprocess, "run", run)
    assert audit.main() == 0
    assert "did not end" in capsys.readouterr().err


@pytest.mark.usefixtures("database")
def test_an_audit_that_breaks_by_itself_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A lock line that pip-audit cannot read must not disable the audit for good."""
    _report(monkeypatch, "")
    assert audit.main() == 1
    assert "pip-audit failed" in capsys.readouterr().err
