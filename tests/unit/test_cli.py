"""The command line's own decisions, without a service."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from restoration.jobs import OutputFormat
from serve_app.cli.display import steps
from serve_app.cli.main import _format_of, app
from serve_app.cli.shared import parse_parameter
from serve_app.local.record import demand_down, find_stack


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("scale=2", ("scale", 2)),
        ("strength=0.5", ("strength", 0.5)),
        ("sharpen=true", ("sharpen", True)),
        ("note=old photo", ("note", "old photo")),
        ("note=a=b", ("note", "a=b")),
        ("note=", ("note", "")),
    ],
)
def test_a_parameter_is_json_if_it_reads_as_json(text: str, parsed: tuple[str, object]) -> None:
    """Numbers and booleans need no quoting, and any other text is taken literally."""
    assert parse_parameter(text) == parsed


def test_a_parameter_without_a_value_is_wrong_usage() -> None:
    """The message quotes it."""
    with pytest.raises(typer.BadParameter, match="'scale' must have the form NAME=VALUE"):
        parse_parameter("scale")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.png", "png"), ("a.JPG", "jpeg"), ("a.jpeg", "jpeg"), ("a.webp", "webp"), ("a", "png")],
)
def test_the_suffix_says_the_format(name: str, expected: OutputFormat) -> None:
    """Suffixes match in any case; a name without a suffix gets a PNG."""
    assert _format_of(Path(name)) == expected


def test_a_suffix_that_cannot_be_written_is_wrong_usage(tmp_path: Path) -> None:
    """A PNG is never written under another suffix; no service is called."""
    photo = tmp_path / "photo.jpg"
    photo.touch()
    done = CliRunner().invoke(app, ["run", str(photo), "-o", str(tmp_path / "out.bmp")])
    assert done.exit_code == 2
    assert ".bmp is none of .png, .jpg" in " ".join(done.stderr.split())


def test_a_missing_folder_for_the_result_is_found_before_the_work(tmp_path: Path) -> None:
    """The installed command prints one line on standard error and exits with status 1."""
    photo = tmp_path / "photo.jpg"
    photo.touch()
    restore = Path(sys.executable).with_name("restore")
    out = tmp_path / "missing" / "out.png"
    done = subprocess.run(
        [restore, "run", photo, "-o", out], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr == f"error: the folder {out.parent} of --output does not exist\n"


@pytest.mark.parametrize(
    ("output", "server", "said"),
    [
        ("photo.png", "http://localhost:1", "is the photo itself; choose another file"),
        ("out.png", "http://localhost:none", "Invalid port"),
    ],
)
def test_what_cannot_go_well_is_one_line(
    tmp_path: Path, output: str, server: str, said: str
) -> None:
    """An output equal to the photo and an invalid address give one line, no traceback."""
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"a photo")
    restore = Path(sys.executable).with_name("restore")
    done = subprocess.run(
        [restore, "run", photo, "-o", tmp_path / output, "--server", server, "--token", "t"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, photo.read_bytes()) == (1, b"a photo")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["show", "cancel"])
def test_a_job_id_is_checked_before_anybody_is_asked(command: str) -> None:
    """A job id that is not a UUID is wrong usage."""
    done = CliRunner().invoke(app, [command, "newest"])
    assert done.exit_code == 2
    assert "Invalid value for 'job_id'" in done.stderr


def test_the_record_of_a_stack_that_was_killed_counts_for_nothing(tmp_path: Path) -> None:
    """A record is believed only while the process that wrote it holds the state folder."""
    record = {"pid": 1, "url": "http://127.0.0.1:1", "ray_address": "x:1", "issuer": None}
    (tmp_path / "stack.json").write_text(json.dumps(record))
    assert find_stack(tmp_path) is None
    demand_down(tmp_path)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_may_be_any_text(terminal: bool) -> None:
    """A log's last line is shown literally, including brackets."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    with steps(console) as tell:
        tell("HAProxy stopped [/bin/haproxy.main()]")
    assert terminal or "[/bin/haproxy.main()]" in out.getvalue()
