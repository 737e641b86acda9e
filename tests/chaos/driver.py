"""Run chaos from the start of a stack to the verdict.

The phases: start a stack and compute references while it is whole; run users and a batch script
beside one fault after another; wait without faults until every job has ended or time is up; judge.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg2

from tests.chaos.batch_process import BatchProcess
from tests.chaos.batch_script import OWNER as BATCH_OWNER
from tests.chaos.breaking import Plan, break_things
from tests.chaos.faults import Strike
from tests.chaos.journal import Change, Journal
from tests.chaos.ledger import Ledger
from tests.chaos.processes import StackProcesses
from tests.chaos.results import make_samples, references, wrong_results
from tests.chaos.revision import Revision
from tests.chaos.users import OWNERS as HTTP_OWNERS
from tests.chaos.users import HttpUsers
from tests.chaos.verdict import Evidence, Verdict, judge
from tests.chaos.webhooks import listening, note_webhooks
from tests.fakes.receiver import Receiver
from tests.support.stack import Stack, running_stack


def run(plan: Plan, tell: Callable[[str], None]) -> Verdict:
    """Break a stack as planned and return the verdict; `tell` receives a line for each event."""
    tell(f"starting a stack with {plan.workers} workers")
    with (
        TemporaryDirectory(prefix="comfy-restore-chaos-") as folder,
        listening() as receiver,
        running_stack(plan.workers, {"LEASE_S": str(plan.lease_s)}) as stack,
    ):
        try:
            return _run(plan, tell, stack, receiver, Path(folder))
        finally:
            if plan.logs is not None:
                _keep_logs(stack.state_dir, plan.logs)


def _run(
    plan: Plan, tell: Callable[[str], None], stack: Stack, receiver: Receiver, folder: Path
) -> Verdict:
    samples = make_samples(folder)
    expected = references(stack, samples, folder)
    processes = StackProcesses(stack.state_dir, plan.lease_s)
    journal = Journal(processes.variable("DATABASE_URL"))
    journal.install()
    ledger = Ledger()
    users = HttpUsers(stack, ledger, samples, receiver.url(), seed=plan.seed)
    with BatchProcess(stack, ledger, samples) as batch:
        users.start(plan.http_every_s, plan.http_at_most)
        began = time.monotonic()
        try:
            strikes = break_things(plan, processes, tell)
            wait_for_successes(ledger, (*HTTP_OWNERS, BATCH_OWNER), plan.stuck_s)
        finally:
            users.submit_no_more()
            broken_s = time.monotonic() - began
        tell(f"calm: waiting until each of {len(ledger.accepted)} accepted jobs has ended")
        batch.submit_no_more()
        _wait_for_ends(journal, plan.stuck_s)
        users.finish(plan.stuck_s)
        batch.finish(plan.stuck_s)
    _wait_for_ends(journal, plan.stuck_s)  # jobs submitted at the last moment
    secret = stack.restore("webhook-secret").stdout.strip()
    note_webhooks(receiver.seen, secret, ledger)
    rows, changes = journal.rows(), journal.changes()
    (stack.state_dir / "chaos.log").write_text(_history(strikes, changes))
    _wait_for_orphans(processes, plan.stuck_s)
    tell("comparing every result with its reference")
    return judge(
        Evidence(
            revision=Revision.now(),
            seconds=broken_s,
            seed=plan.seed,
            ledger=ledger,
            strikes=strikes,
            rows=rows,
            changes=changes,
            wrong=wrong_results(stack, ledger, rows, expected, folder),
            leaked=len(processes.leaked_engines()),
        )
    )


def wait_for_successes(ledger: Ledger, owners: Sequence[str], patience_s: float) -> None:
    """Return when each owner has a job that succeeded, or no job was seen to end for
    `patience_s`."""
    pause = threading.Event()
    seen, until = len(ledger.seen), time.monotonic() + patience_s
    while ledger.without_success(owners) and time.monotonic() < until:
        pause.wait(0.5)
        if len(ledger.seen) > seen:
            seen, until = len(ledger.seen), time.monotonic() + patience_s


def _wait_for_orphans(processes: StackProcesses, patience_s: float) -> None:
    """Return when each engine has an owner: the engines of a killed worker end by themselves."""
    pause = threading.Event()
    until = time.monotonic() + patience_s
    while processes.leaked_engines() and time.monotonic() < until:
        pause.wait(0.5)


def _wait_for_ends(journal: Journal, patience_s: float) -> None:
    """Return when all jobs have ended and their webhooks are sent, or none did for `patience_s`."""
    pause = threading.Event()
    fewest, until = sys.maxsize, time.monotonic() + patience_s
    while fewest and time.monotonic() < until:
        pause.wait(0.5)
        with suppress(psycopg2.OperationalError):
            if (left := journal.unfinished()) < fewest:
                fewest, until = left, time.monotonic() + patience_s


def _history(strikes: list[Strike], changes: list[Change]) -> str:
    """Return faults and state changes ordered by time, one a line."""
    lines = [(s.at, f"*** {s.kind}: {s.detail}") for s in strikes]
    lines += [(c.at, f"{c.job_id} {c.attempt} {c.source} -> {c.target}") for c in changes]
    return "".join(
        f"{datetime.fromtimestamp(at, UTC):%H:%M:%S.%f} {text}\n" for at, text in sorted(lines)
    )


def _keep_logs(state_dir: Path, target: Path) -> None:
    """Copy the stack's logs, which are deleted with its state folder, to explain a failure
    later."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for log in [
        *state_dir.glob("*.log"),
        *state_dir.glob("logs/*"),
        *state_dir.glob("engines/*/*.log"),
    ]:
        shutil.copy(log, target / "-".join(log.relative_to(state_dir).parts))
