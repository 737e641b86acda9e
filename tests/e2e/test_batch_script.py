"""The batch script of docs/examples, run as by an operator: in its own process, through Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from restoration.jobs import JobStatus
from tests.support.photos import degrade, jpeg, original
from tests.support.stack import Stack

pytestmark = pytest.mark.real_engine

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "batch_restore.py"
NAMES = ["a", "b", "c", "d", "e"]


def test_a_folder_is_restored_through_ray_handles(stack: Stack, tmp_path: Path) -> None:
    """Good photos' results are on disk, the broken one is reported, and the output has only the
    script's lines. Over HTTP the script's owner gets the same jobs and bytes."""
    photos, results, over_http = (tmp_path / name for name in ("photos", "results", "over_http"))
    photos.mkdir()
    photo = degrade(original("flower"))
    for width, name in enumerate(NAMES, start=48):
        (photos / f"{name}.jpg").write_bytes(jpeg(photo.crop((0, 0, width, 40))))
    (photos / "broken.jpg").write_bytes(jpeg(photo)[:1000])

    done = run_script(stack, photos, results)

    assert done.returncode == 1, "one photo was not restored"
    assert done.stderr == ""
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert told.pop("broken.jpg").startswith("refused: the image cannot be decoded")
    assert told == {f"{name}.jpg": "succeeded" for name in NAMES}
    for width, name in enumerate(NAMES, start=48):
        with Image.open(results / f"{name}.png") as image:
            assert image.size == (2 * width, 80)

    with stack.client("archive") as client:
        jobs = list(client.list())
        assert [job.status for job in jobs] == [JobStatus.SUCCEEDED] * len(NAMES)
        for job in jobs:
            client.download(job.id, over_http)
            assert over_http.read_bytes() in {path.read_bytes() for path in results.iterdir()}


def run_script(stack: Stack, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run the script. RAY_ADDRESS selects the stack, and ~/.ray/auth_token authenticates."""
    environ = {"RAY_ADDRESS": stack.record.ray_address}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
