"""Point 12: a batch's status, computed from its counts alone; and the names of its photos."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restoration.batches import MAX_ITEM_NAME_CHARS, BatchCounts, BatchStatus, item_name

COUNTS = st.builds(BatchCounts, **dict.fromkeys(BatchCounts.__slots__, st.integers(0, 3)))


@pytest.mark.batches
@pytest.mark.parametrize(
    ("counts", "status"),
    [
        (BatchCounts(queued=1, succeeded=9), BatchStatus.RUNNING),
        (BatchCounts(running=1, failed=9), BatchStatus.RUNNING),
        (BatchCounts(cancelling=1, cancelled=9), BatchStatus.RUNNING),
        (BatchCounts(succeeded=10), BatchStatus.SUCCEEDED),
        (BatchCounts(succeeded=9, failed=1), BatchStatus.PARTLY_FAILED),
        (BatchCounts(succeeded=9, refused=1), BatchStatus.PARTLY_FAILED),
        (BatchCounts(failed=9, refused=1), BatchStatus.FAILED),
        (BatchCounts(refused=10), BatchStatus.FAILED),
        (BatchCounts(succeeded=9, cancelled=1), BatchStatus.CANCELLED),
        (BatchCounts(failed=9, cancelled=1), BatchStatus.CANCELLED),
        (BatchCounts(succeeded=1, expired=9), BatchStatus.SUCCEEDED),
        (BatchCounts(failed=1, expired=9), BatchStatus.PARTLY_FAILED),
    ],
)
def test_the_status_follows_from_the_counts(counts: BatchCounts, status: BatchStatus) -> None:
    """A batch runs until its last job has ended; then the photos' outcomes decide."""
    assert counts.status is status
    assert counts.total == 10


@pytest.mark.batches
@given(COUNTS)
def test_a_batch_is_final_when_nothing_can_change_any_more(counts: BatchCounts) -> None:
    """The batch runs exactly while a job waits, runs or is being cancelled."""
    open_jobs = counts.queued + counts.running + counts.cancelling
    assert counts.status.is_final is (open_jobs == 0)
    assert counts.ended + open_jobs == counts.total


@pytest.mark.batches
@given(COUNTS)
def test_one_more_photo_never_turns_failure_into_success(counts: BatchCounts) -> None:
    """`succeeded` requires every photo: a batch with a refused one never has it."""
    assert replace(counts, refused=counts.refused + 1).status is not BatchStatus.SUCCEEDED


@pytest.mark.batches
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("Übung 1.jpg", "Übung 1.jpg"),
        ("a\nb\x00.png", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}.png"),
        ("Screenshot 9.41\u202fPM.png", "Screenshot 9.41\u202fPM.png"),
        ("👨\u200d👩.jpg", "👨\u200d👩.jpg"),
        ("gpj.\u202eexe", "gpj.\N{REPLACEMENT CHARACTER}exe"),
        ("\udce4.png", "\N{REPLACEMENT CHARACTER}.png"),
        ("x" * 300, "x" * MAX_ITEM_NAME_CHARS),
    ],
)
def test_names_are_fit_to_be_stored_and_shown(name: str, kept: str) -> None:
    """Characters unsafe for terminals, logs or the database are replaced, and length is bounded."""
    assert item_name(name) == kept
