"""The verdict of a chaos run, on made-up evidence for each way in which a run can go wrong."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from persistence.objects.keys import output_key
from restoration.jobs import AttemptRef, JobStatus, OutputFormat
from restoration.webhooks.messages import message_id, secret_key, signed_headers
from tests.chaos.faults import Strike
from tests.chaos.journal import Change, Row
from tests.chaos.ledger import Ledger
from tests.chaos.revision import Revision
from tests.chaos.verdict import Evidence, Verdict, judge
from tests.chaos.webhooks import note_webhooks
from tests.fakes.receiver import SECRET, Seen

PNG = OutputFormat.PNG
REVISION = Revision("53486a3", "2026-11-29")
QUEUED, RUNNING, SUCCEEDED = JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED


def job_row(
    job_id: UUID, status: JobStatus, *, result_of: int = 2, wants_webhook: bool = False
) -> Row:
    ended_at = 20.0 if status.is_final else None
    key = output_key(AttemptRef(job_id, result_of), PNG) if status is SUCCEEDED else None
    return Row(job_id, status, PNG, "alice", 2, 10.0, ended_at, key, None, None, wants_webhook)


def verdict_on(*rows: Row, changes: tuple[Change, ...] = (), **evidence: object) -> Verdict:
    """Return the verdict on jobs that were all accepted."""
    ledger = Ledger()
    for row in rows:
        ledger.accepts(row.job_id, row.owner, "flower")
    whole = {"ledger": ledger, "strikes": (), "wrong": {}, "leaked": 0} | evidence
    by_id = {row.job_id: row for row in rows}
    return judge(Evidence(REVISION, 60, 0, rows=by_id, changes=changes, **whole))  # type: ignore[arg-type]


def test_an_accepted_job_without_a_row_is_lost() -> None:
    """The ledger holds the accepted jobs; the rows hold the existing ones."""
    ledger = Ledger()
    ledger.accepts(uuid4(), "alice", "flower")
    assert (verdict_on(ledger=ledger).lost, verdict_on(ledger=ledger).ok) == (1, False)


def test_a_job_that_has_not_ended_is_lost() -> None:
    """A job that hangs counts like one that vanished."""
    assert verdict_on(job_row(uuid4(), RUNNING)).lost == 1


def test_a_change_after_the_end_is_a_second_end() -> None:
    """The change counts even if the row, which shows only the last state, looks normal."""
    job_id = uuid4()
    again = Change(job_id, 2, SUCCEEDED, SUCCEEDED, 30.0)
    assert verdict_on(job_row(job_id, SUCCEEDED), changes=(again,)).doubled == 1


def test_an_end_that_a_client_was_told_otherwise_is_a_second_end() -> None:
    """An end that a client received is final."""
    row = job_row(uuid4(), SUCCEEDED)
    ledger = Ledger()
    ledger.accepts(row.job_id, row.owner, "flower")
    ledger.sees_end(row.job_id, JobStatus.FAILED)
    assert verdict_on(row, ledger=ledger).doubled == 1


@pytest.mark.lease
def test_the_result_of_another_attempt_is_a_hole_in_the_fence() -> None:
    """The result is wrong despite its right pixels: every attempt at a job yields the same."""
    late = job_row(uuid4(), SUCCEEDED, result_of=1)
    verdict = verdict_on(late, job_row(uuid4(), SUCCEEDED), job_row(uuid4(), RUNNING))
    assert verdict.foreign == 1
    assert f"{late.job_id} has the result outputs/{late.job_id}/1.png" in verdict.offenders


@pytest.mark.lease
def test_a_result_of_another_attempt_fails_the_run() -> None:
    """The row says that the second attempt ended the job with the first attempt's result."""
    assert verdict_on(job_row(uuid4(), SUCCEEDED)).ok
    assert not verdict_on(job_row(uuid4(), SUCCEEDED, result_of=1)).ok


@pytest.mark.webhooks
def test_an_end_that_no_webhook_told_is_untold() -> None:
    """Each job that asked for a webhook needs one; the others do not."""
    asked, not_asked = (job_row(uuid4(), SUCCEEDED, wants_webhook=wants) for wants in (True, False))
    verdict = verdict_on(asked, not_asked)
    assert (verdict.untold, verdict.ok) == (1, False)
    assert verdict.offenders == [f"{asked.job_id} had no webhook"]


@pytest.mark.webhooks
def test_a_webhook_tells_an_end_as_any_client_is_told() -> None:
    """A webhook that reports another end than the row counts as a second end."""
    row = job_row(uuid4(), SUCCEEDED, wants_webhook=True)
    ledger = Ledger()
    note_webhooks([signed(row.job_id, "failed", SECRET)], SECRET, ledger)
    verdict = verdict_on(row, ledger=ledger)
    assert (verdict.untold, verdict.webhooks, verdict.doubled) == (0, 1, 1)


@pytest.mark.webhooks
def test_a_webhook_with_a_foreign_signature_tells_nothing() -> None:
    """A receiver would reject it, so the end counts as not delivered."""
    row = job_row(uuid4(), SUCCEEDED, wants_webhook=True)
    ledger = Ledger()
    foreign = signed(row.job_id, "succeeded", "whsec_" + base64.b64encode(bytes(32)).decode())
    note_webhooks([foreign], SECRET, ledger)
    assert verdict_on(row, ledger=ledger).untold == 1


def signed(job_id: UUID, end: str, secret: str) -> Seen:
    body = json.dumps({"type": f"restoration.{end}", "data": {"id": str(job_id)}}).encode()
    headers = signed_headers(secret_key(secret), message_id(job_id), int(time.time()), body)
    return Seen("/hook", headers, body)


def test_a_broken_attempts_delay_is_counted_from_its_first_fault() -> None:
    """The delay runs from the fault, not its detection, to the start of the next attempt."""
    row = job_row(uuid4(), SUCCEEDED)
    changes = (
        Change(row.job_id, 1, QUEUED, RUNNING, 11.0),
        Change(row.job_id, 1, RUNNING, QUEUED, 16.0),
        Change(row.job_id, 2, QUEUED, RUNNING, 17.5),
    )
    strikes = (Strike("before", 10.5, ""), Strike("first", 12.0, ""), Strike("second", 15.0, ""))
    verdict = verdict_on(row, changes=changes, strikes=strikes)
    assert (verdict.broken_attempts, verdict.longest_delay_s) == (1, 5.5)


def test_the_report_names_the_code_that_it_is_about() -> None:
    """The table shows the date and the commit, and the file the commit."""
    verdict = verdict_on()
    assert dict(verdict.table())["date, commit"] == "2026-11-29, 53486a3"
    assert verdict.as_json()["commit"] == "53486a3"


def test_the_commit_is_gits_and_says_when_there_was_more_than_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy without history has no commit, and uncommitted changes are reported."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    assert Revision.now(tmp_path).commit == "unknown"
    for words in (
        ("init", "--quiet"),
        ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-mx"),
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    whole = Revision.now(tmp_path).commit
    (tmp_path / "more").touch()
    subprocess.run(["git", "-C", str(tmp_path), "add", "more"], check=True)
    assert Revision.now(tmp_path).commit == f"{whole}-dirty"
