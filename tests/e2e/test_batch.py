"""Point 12 through the whole real system: a folder from a terminal, and files through Ray."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from actors.batch import Batch, connect
from restoration.batches import BatchStatus
from restoration.errors import UnknownWorkflow
from restoration.jobs import JobStatus
from tests.e2e.conftest import Stack
from tests.photos import degrade, original

pytestmark = pytest.mark.real_engine


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three small photos, all different, and a file that is none."""
    folder = tmp_path / "scans"
    folder.mkdir()
    photo = degrade(original("flower"))
    for name, width in [("a.png", 48), ("b.jpg", 56), ("c.webp", 64)]:
        photo.crop((0, 0, width, 40)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_12_a_folder_is_restored_from_a_terminal(stack: Stack, scans: Path, tmp_path: Path) -> None:
    """Every photo's own restoration under its own name; the one that is none is told."""
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


@pytest.fixture
def batch(stack: Stack) -> Iterator[Batch]:
    with connect(owner="archive", address=stack.record.ray_address) as batch:
        yield batch


def test_12_files_are_one_batch_through_handles(batch: Batch, scans: Path) -> None:
    """Submitted, watched and cancelled as one; errors cross the cluster as what they are."""
    accepted = batch.submit_batch(sorted(scans.iterdir()), workflow="enlarge")
    assert [path.name for path, _ in accepted.refused] == ["broken.png"]
    for result in batch.as_completed(accepted.jobs):
        assert result.job.status is JobStatus.SUCCEEDED, result.job.failure
    standing = batch.batch_status(accepted.id)
    assert standing.status is BatchStatus.PARTLY_FAILED
    assert (standing.counts.succeeded, standing.counts.refused) == (3, 1)
    assert batch.cancel_batch(accepted.id) == standing
    with pytest.raises(UnknownWorkflow):
        batch.submit_batch(scans.iterdir(), workflow="nope")
