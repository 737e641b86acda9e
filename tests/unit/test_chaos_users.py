"""The users of a chaos run record what they receive, and do not hide their own errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from restoration.events import JobEvent, Progressed, StateChanged
from restoration.jobs import JobStatus
from tests.chaos import batch_process
from tests.chaos.batch_process import BatchProcess
from tests.chaos.driver import wait_for_successes
from tests.chaos.ledger import Ledger, Sample
from tests.chaos.users import HttpUsers, watch_to_end

DEADLINE_S = 300
RUNNING, FAILED, SUCCEEDED = JobStatus.RUNNING, JobStatus.FAILED, JobStatus.SUCCEEDED


class TwoTongues:
    """A client whose service streams one end and answers another."""

    def events(self, _job_id: UUID) -> Iterator[JobEvent]:
        yield from (StateChanged(RUNNING, 1), Progressed(0.5, "engine", 1), StateChanged(FAILED, 1))

    def get(self, _job_id: UUID) -> Any:
        return SimpleNamespace(status=SUCCEEDED)


def test_the_end_in_the_stream_is_put_down_apart_from_the_jobs_own() -> None:
    """Otherwise the row would hide a stream that reported another end."""
    job_id, ledger, client = uuid4(), Ledger(), TwoTongues()
    watch_to_end(client, job_id, ledger)  # type: ignore[arg-type]
    assert ledger.seen == [(job_id, FAILED), (job_id, SUCCEEDED)]


def test_an_error_in_a_users_thread_comes_out_at_the_end() -> None:
    """Otherwise users that broke would submit nothing, and no job could be lost."""
    submits = threading.Event()

    class Full(Ledger):
        def submits(self) -> None:
            submits.set()
            raise MemoryError

    sample = Sample("flower", Path(), b"")
    users = HttpUsers(a_stack(Path()), Full(), [sample], "http://127.0.0.1:1/", seed=0)
    users.start(period_s=0.01, at_most=1)
    assert submits.wait(DEADLINE_S)
    users.submit_no_more()
    with pytest.raises(MemoryError):
        users.finish(DEADLINE_S)


def test_a_batch_script_that_does_not_connect_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the run would go on without testing jobs that come through handles."""
    monkeypatch.setattr(batch_process, "CONNECT_TIMEOUT_S", 0.01)
    with pytest.raises(ChildProcessError), BatchProcess(a_stack(tmp_path), Ledger(), []):
        pass


def a_stack(state_dir: Path) -> Any:
    record = SimpleNamespace(url="http://127.0.0.1:1", ray_address="127.0.0.1:1")
    return SimpleNamespace(state_dir=state_dir, record=record, token=lambda _owner: "token")


def test_a_run_goes_on_until_each_owner_has_had_a_success() -> None:
    """However slow the machine, the run gives up only when no more jobs end."""
    ledger = Ledger()
    ann, bob = uuid4(), uuid4()
    ledger.accepts(ann, "ann", "flower")
    ledger.accepts(bob, "bob", "flower")
    ledger.sees_end(ann, SUCCEEDED)
    ledger.sees_end(bob, FAILED)
    assert ledger.without_success(["ann", "bob", "carol"]) == {"bob", "carol"}

    wait_for_successes(ledger, ["ann", "bob"], patience_s=0)
    waiting = threading.Thread(target=wait_for_successes, args=(ledger, ["ann", "bob"], DEADLINE_S))
    waiting.start()
    assert waiting.is_alive()
    ledger.sees_end(bob, SUCCEEDED)
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()
