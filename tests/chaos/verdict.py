"""The verdict on a chaos run: promises compared with evidence.

lost     an accepted job that does not exist, or any job that had not ended when time was up
doubled  a job that ended more than once, changed after its end, or was reported to a client with
         another end than its row has
wrong    a succeeded job whose result is missing, or differs from the reference's pixels
leaked   a ComfyUI without an owner
foreign  a succeeded job with the result of another attempt than its row's: fencing has failed
untold   a job that ended, but whose webhook did not arrive or was not signed by the service
Delays are in seconds. `longest_delay_s` is the longest time from the first fault during a broken
attempt to the start of the job's next attempt. `longest_stall_s` is the longest time from a fault,
with unfinished jobs, to the next success of any job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from uuid import UUID

from persistence.objects.keys import output_key
from restoration.jobs import AttemptRef, JobStatus
from tests.chaos.faults import Strike
from tests.chaos.journal import Change, Row
from tests.chaos.ledger import Ledger
from tests.chaos.revision import Revision

UNHIT = "no fault in the attempt"


@dataclass(frozen=True, slots=True)
class Verdict:
    date: str
    commit: str
    seconds: float
    seed: int
    submitted: int
    accepted: int
    succeeded: int
    failed: int
    cancelled: int
    lost: int
    doubled: int
    wrong: int
    leaked: int
    foreign: int
    untold: int
    webhooks: int
    broken_attempts: int
    longest_delay_s: float
    longest_stall_s: float
    failures: Mapping[str, int]
    troubles: Mapping[str, int]
    faults: Mapping[str, int]
    successes: Mapping[str, int]  # of each owner
    delays_s: Mapping[str, float]  # the longest for each kind of fault that ended attempts
    offenders: Sequence[str]

    @property
    def ok(self) -> bool:
        faults = (self.lost, self.doubled, self.wrong, self.leaked, self.foreign, self.untold)
        return not any(faults)

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def table(self) -> list[tuple[str, str]]:
        """Return names and values in the order of the report."""
        return [
            ("date, commit", f"{self.date}, {self.commit}"),
            ("seconds of chaos", f"{self.seconds:.0f}"),
            ("faults", str(sum(self.faults.values()))),
            ("submitted", str(self.submitted)),
            ("accepted", str(self.accepted)),
            ("succeeded", str(self.succeeded)),
            ("failed, with cause", " ".join([str(self.failed), *_listed(self.failures)])),
            ("cancelled", str(self.cancelled)),
            ("webhooks received", str(self.webhooks)),
            ("attempts broken off", str(self.broken_attempts)),
            ("**lost**", str(self.lost)),
            ("**finished twice**", str(self.doubled)),
            ("**wrong bytes**", str(self.wrong)),
            ("**engines leaked**", str(self.leaked)),
            ("**results of another attempt**", str(self.foreign)),
            ("**ends not told by webhook**", str(self.untold)),
            ("longest delay of a broken attempt", f"{self.longest_delay_s:.1f} s"),
            ("longest time without a success", f"{self.longest_stall_s:.1f} s"),
        ]


def _listed(counts: Mapping[str, int]) -> list[str]:
    return [f"({', '.join(f'{what} {count}' for what, count in counts.items())})"] if counts else []


@dataclass(frozen=True, slots=True)
class Evidence:
    """All evidence, collected after the last job has ended.

    `wrong` names the jobs whose result differs from the reference; `leaked` counts engines.
    """

    revision: Revision
    seconds: float
    seed: int
    ledger: Ledger
    strikes: Sequence[Strike]
    rows: Mapping[UUID, Row]
    changes: Sequence[Change]
    wrong: Mapping[UUID, str]
    leaked: int


def judge(evidence: Evidence) -> Verdict:
    rows, ledger = evidence.rows, evidence.ledger
    missing = [job_id for job_id in ledger.accepted if job_id not in rows]
    unended = [row.job_id for row in rows.values() if not row.status.is_final]
    foreign = [row.job_id for row in rows.values() if has_foreign_result(row)]
    untold = _untold(rows.values(), ledger)
    doubled = doubled_jobs(rows, evidence.changes, ledger.seen)
    delays = delays_of_broken_attempts(evidence.changes, evidence.strikes)
    delays_s = _longest_of_each(delays)
    ends = Counter(row.status for job_id, row in rows.items() if job_id in ledger.accepted)
    successes = Counter(row.owner for row in rows.values() if row.status is JobStatus.SUCCEEDED)
    return Verdict(
        date=evidence.revision.date,
        commit=evidence.revision.commit,
        seconds=round(evidence.seconds, 1),
        seed=evidence.seed,
        submitted=ledger.submitted,
        accepted=len(ledger.accepted),
        succeeded=ends[JobStatus.SUCCEEDED],
        failed=ends[JobStatus.FAILED],
        cancelled=ends[JobStatus.CANCELLED],
        lost=len(missing) + len(unended),
        doubled=len(doubled),
        wrong=len(evidence.wrong),
        leaked=evidence.leaked,
        foreign=len(foreign),
        untold=len(untold),
        webhooks=ledger.webhooks.total(),
        broken_attempts=len(delays),
        longest_delay_s=max(delays_s.values(), default=0.0),
        longest_stall_s=round(longest_stall_s(rows, evidence.strikes), 1),
        failures=dict(Counter(row.failure_code for row in rows.values() if row.failure_code)),
        troubles=dict(ledger.troubles),
        successes=dict(successes),
        delays_s=delays_s,
        faults=dict(Counter(strike.kind for strike in evidence.strikes)),
        offenders=[
            *(f"{job_id} does not exist" for job_id in missing),
            *(f"{job_id} is still {rows[job_id].status}" for job_id in unended),
            *(f"{job_id} {why}" for job_id, why in doubled.items()),
            *(f"{job_id} has the result {rows[job_id].output_key}" for job_id in foreign),
            *(f"{job_id} had no webhook" for job_id in untold),
            *(f"{job_id} {why}" for job_id, why in evidence.wrong.items()),
        ],
    )


def _untold(rows: Iterable[Row], ledger: Ledger) -> list[UUID]:
    """Return the ended jobs whose webhook never arrived."""
    ended = (row for row in rows if row.wants_webhook and row.status.is_final)
    return [row.job_id for row in ended if row.job_id not in ledger.webhooks]


def _longest_of_each(delays: Iterable[tuple[str, float]]) -> dict[str, float]:
    longest: dict[str, float] = {}
    for kind, delay_s in delays:
        longest[kind] = max(round(delay_s, 1), longest.get(kind, 0.0))
    return longest


def doubled_jobs(
    rows: Mapping[UUID, Row], changes: Iterable[Change], seen: Iterable[tuple[UUID, JobStatus]]
) -> dict[UUID, str]:
    """Return each job that ended more than once, with the evidence."""
    found: dict[UUID, str] = {}
    for change in changes:
        if change.source.is_final:
            found[change.job_id] = f"went from {change.source} to {change.target}"
    for job_id, status in seen:
        row = rows.get(job_id)
        if row is not None and row.status is not status:
            found[job_id] = f"was shown as {status}, and is {row.status}"
    return found


def has_foreign_result(row: Row) -> bool:
    """Return whether the job succeeded with the result of an attempt other than its row's."""
    own = output_key(AttemptRef(row.job_id, row.attempt), row.output_format)
    return row.status is JobStatus.SUCCEEDED and row.output_key != own


def delays_of_broken_attempts(
    changes: Iterable[Change], strikes: Sequence[Strike]
) -> list[tuple[str, float]]:
    """Return for each attempt handed back the kind of the first fault during it, and the seconds
    from that fault to the job's next attempt. An attempt without a fault is UNHIT, and counts from
    its hand-back."""
    began: dict[UUID, float] = {}
    broken: dict[UUID, Strike] = {}
    delays = []
    for change in changes:
        job_id = change.job_id
        if change.target is JobStatus.RUNNING:
            began[job_id] = change.at
            if (cause := broken.pop(job_id, None)) is not None:
                delays.append((cause.kind, change.at - cause.at))
        elif change.target is JobStatus.QUEUED:
            hits = [strike for strike in strikes if began[job_id] <= strike.at <= change.at]
            broken[job_id] = min(hits, key=lambda hit: hit.at, default=Strike(UNHIT, change.at, ""))
    return delays


def longest_stall_s(rows: Mapping[UUID, Row], strikes: Iterable[Strike]) -> float:
    """Return the longest time in seconds from a fault with open jobs to the next success."""
    successes = sorted(
        row.finished_at
        for row in rows.values()
        if row.status is JobStatus.SUCCEEDED and row.finished_at is not None
    )
    longest = 0.0
    for strike in strikes:
        after = [at for at in successes if at > strike.at]
        if after and any(_open_at(row, strike.at) for row in rows.values()):
            longest = max(longest, after[0] - strike.at)
    return longest


def _open_at(row: Row, at: float) -> bool:
    return row.created_at <= at and (row.finished_at is None or row.finished_at > at)
