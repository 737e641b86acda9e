"""Reuse through the complete system: equal work is not done twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from restoration.events import StateChanged
from restoration.jobs import JobStatus
from restoration.reuse import Reuse
from tests.support.photos import degrade, jpeg, original
from tests.support.stack import Stack

pytestmark = pytest.mark.real_engine


@pytest.mark.reuse
def test_the_second_time_no_engine_runs(stack: Stack, tmp_path: Path) -> None:
    """The second job has the same bytes and succeeds without an attempt. Batches reuse by default,
    and with `never` the photo is restored again."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg(degrade(original("flower")).crop((8, 8, 72, 56))))
    with stack.client("reuse") as client:
        first = client.wait(client.submit(photo, workflow="enlarge").id)
        again = client.submit(photo, workflow="enlarge", reuse=Reuse.ALLOW)
        assert (again.status, again.attempt, again.attempts) == (JobStatus.SUCCEEDED, 0, ())
        assert again.reused_from == first.id != again.id
        assert list(client.events(again.id)) == [StateChanged(JobStatus.SUCCEEDED, 0)]
        batch = client.submit_batch([photo], workflow="enlarge")
        [item] = batch.items
        assert (batch.counts.succeeded, item.status) == (1, "succeeded")
        assert item.job_id is not None
        anew = client.submit_batch([photo], workflow="enlarge", reuse=Reuse.NEVER)
        assert anew.counts.queued == 1
        results = []
        for job_id in (first.id, again.id, item.job_id):
            client.download(job_id, tmp_path / "result.png")
            results.append((tmp_path / "result.png").read_bytes())
        assert results[0] == results[1] == results[2]
        client.cancel_batch(anew.id)


@pytest.mark.reuse
def test_from_a_terminal(stack: Stack, tmp_path: Path) -> None:
    """With `--reuse` the result is on disk as usual, and the output says that it is reused."""
    photo, result = tmp_path / "photo.jpg", tmp_path / "restored.png"
    photo.write_bytes(jpeg(degrade(original("flower")).crop((4, 4, 52, 36))))
    run = ("run", str(photo), "-o", str(result), "--workflow", "enlarge")
    stack.restore(*run)
    restored = result.read_bytes()
    result.unlink()
    told = stack.restore(*run, "--reuse").stderr.splitlines()[-1]
    assert told == f"restored to {result}, with the result of an earlier job"
    assert result.read_bytes() == restored
