"""Logs: one structured line per event, without secrets in a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog

from actors.observability.logging import configure_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    configure_logging("console")


def _fail_with_a_secret() -> None:
    token = "hunter2-token"
    raise ValueError(f"of {len(token)} characters")


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_traceback_shows_no_local_variable(
    style: Literal["json", "console"], capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of a failed frame, such as a token, are not written."""
    configure_logging(style)
    try:
        _fail_with_a_secret()
    except ValueError:
        structlog.get_logger().exception("failed")
    written = capsys.readouterr().err
    assert "of 13 characters" in written
    assert "hunter2" not in written


def test_a_line_carries_what_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """The job's id, bound once, is a separate field in each line."""
    configure_logging("json")
    with structlog.contextvars.bound_contextvars(job_id="a1"):
        structlog.get_logger().info("attempt_ended", status="succeeded")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["job_id"], line["status"]) == ("attempt_ended", "a1", "succeeded")
