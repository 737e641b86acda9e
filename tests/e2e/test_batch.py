"""Batches through the complete system: a folder from a terminal, and files through Ray handles."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.photos import degrade, original
from tests.support.stack import Stack

pytestmark = pytest.mark.real_engine


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Create three small different photos, and a file that is not a picture."""
    folder = tmp_path / "scans"
    folder.mkdir()
    photo = degrade(original("flower"))
    for name, width in [("a.png", 48), ("b.jpg", 56), ("c.webp", 64)]:
        photo.crop((0, 0, width, 40)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.mark.batches
def test_a_folder_is_restored_from_a_terminal(stack: Stack, scans: Path, tmp_path: Path) -> None:
    """Each photo is restored under its own name, and the broken file is reported."""
    results = tmp_path / "results"
    done = stack.restore(
        *("batch", "submit", str(scans), "-o", str(results)),
        *("--workflow", "enlarge", "--param", "scale=2"),
        check=False,
    )
    assert done.returncode == 1
    assert "broken.png: refused" in done.stderr
    assert "partly_failed: 3 succeeded, 1 refused" in done.stderr
    assert {path.name: width_of(path) for path in results.iterdir()} == {
        "a.png": 96,
        "b.png": 112,
        "c.png": 128,
    }


def width_of(path: Path) -> int:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return image.width


@pytest.mark.batches
def test_files_are_one_batch_through_handles(stack: Stack, scans: Path) -> None:
    """Files are submitted, watched and cancelled as one batch; errors keep their class across
    Ray."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.batch_handles", *sorted(scans.iterdir())],
        env={**os.environ, "RAY_ADDRESS": stack.record.ray_address, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["wrong_as_a_whole"] == "unknown_workflow"
    assert told["refused"] == {"broken.png": "unsupported_image"}
    assert told["ended"] == ["succeeded"] * 3
    assert told["status"] == "partly_failed"
    assert (told["counts"]["succeeded"], told["counts"]["refused"]) == (3, 1)
    assert told["unchanged_by_cancel"]
    assert told["with_progress"] >= 2, "the status actor may hear of the last a moment later"
