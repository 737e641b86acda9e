"""The promise of a 202, kept while everything is killed: `make chaos`, at the size of a test."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from restoration.jobs import JobStatus
from tests.chaos.driver import Plan, run
from tests.chaos.faults import Strike
from tests.chaos.journal import Change, Row
from tests.chaos.ledger import Ledger
from tests.chaos.verdict import Evidence, Verdict, judge

QUEUED, RUNNING, SUCCEEDED = JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED


@pytest.mark.real_engine
@pytest.mark.usefixtures("engine_install")
def test_01_no_accepted_job_is_lost_doubled_or_wrong_whatever_dies() -> None:
    """Most of a minute in which one part after another is killed or stopped: every accepted job
    ends, once, with the right picture, and no engine is left behind."""
    lines: list[str] = []
    verdict = run(Plan(seconds=45, seed=7), lines.append)
    report = "\n".join([*lines, *verdict.offenders, *(f"{n}: {v}" for n, v in verdict.table())])
    assert verdict.ok, report
    assert verdict.succeeded > 0, report
    assert sum(verdict.faults.values()) >= 4, report


def job_row(job_id: UUID, status: JobStatus) -> Row:
    ended_at = 20.0 if status.is_final else None
    return Row(job_id, "alice", status, 1, 10.0, ended_at, None, None, None)


def verdict_on(*rows: Row, changes: tuple[Change, ...] = (), **evidence: object) -> Verdict:
    """The verdict on jobs that were all accepted."""
    ledger = Ledger()
    for row in rows:
        ledger.accepts(row.job_id, row.owner, "flower")
    whole = {"ledger": ledger, "strikes": (), "wrong": {}, "leaked": 0} | evidence
    by_id = {row.job_id: row for row in rows}
    return judge(Evidence(60, 0, rows=by_id, changes=changes, **whole))  # type: ignore[arg-type]


def test_an_accepted_job_without_a_row_is_lost() -> None:
    """The ledger is what was promised, the rows are what there is."""
    ledger = Ledger()
    ledger.accepts(uuid4(), "alice", "flower")
    assert (verdict_on(ledger=ledger).lost, verdict_on(ledger=ledger).ok) == (1, False)


def test_a_job_that_has_not_ended_is_lost() -> None:
    """A job that hangs is no better than one that vanished."""
    assert verdict_on(job_row(uuid4(), RUNNING)).lost == 1


def test_a_change_after_the_end_is_a_second_end() -> None:
    """Even when the row, which shows the last state only, looks like any other."""
    job_id = uuid4()
    again = Change(job_id, 2, SUCCEEDED, SUCCEEDED, 30.0)
    assert verdict_on(job_row(job_id, SUCCEEDED), changes=(again,)).doubled == 1


def test_an_end_that_a_client_was_told_otherwise_is_a_second_end() -> None:
    """What a client has been told is final."""
    row = job_row(uuid4(), SUCCEEDED)
    ledger = Ledger()
    ledger.accepts(row.job_id, row.owner, "flower")
    ledger.sees_end(row.job_id, JobStatus.FAILED)
    assert verdict_on(row, ledger=ledger).doubled == 1


def test_a_broken_attempts_delay_is_counted_from_its_first_fault() -> None:
    """From the fault, not from when it was noticed, to the next attempt's begin."""
    row = job_row(uuid4(), SUCCEEDED)
    changes = (
        Change(row.job_id, 1, QUEUED, RUNNING, 11.0),
        Change(row.job_id, 1, RUNNING, QUEUED, 16.0),
        Change(row.job_id, 2, QUEUED, RUNNING, 17.5),
    )
    strikes = (Strike("before", 10.5, ""), Strike("first", 12.0, ""), Strike("second", 15.0, ""))
    verdict = verdict_on(row, changes=changes, strikes=strikes)
    assert (verdict.broken_attempts, verdict.longest_delay_s) == (1, 5.5)
