"""A job's ended attempts: a JSON array in its row, appended to by the UPDATE that ends an attempt.

They are not a table of their own, because they are read and deleted with the job.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from sqlalchemy import ColumnElement, Integer, Text, case, func, literal
from sqlalchemy.dialects.postgresql import JSONB

from persistence.postgres.tables import jobs
from restoration.jobs import MAX_RECORDS, AttemptOutcome, Failure

# Each attempt's message is cut to this. The failure that ends the job has its own columns, uncut.
_MAX_MESSAGE_CHARS = 1_000


def with_attempt(outcome: AttemptOutcome, failure: Failure | None = None) -> ColumnElement[Any]:
    """Return `jobs.attempts` with the row's current attempt appended, which has ended.

    Drops the oldest attempt at MAX_RECORDS.
    """
    fields = {
        "attempt": jobs.c.attempt,
        "worker": jobs.c.worker,
        "started_at": jobs.c.started_at,
        "ended_at": func.now(),
        "outcome": literal(outcome, Text),
        "code": literal(failure.code if failure else None, Text),
        "message": literal(failure.message[:_MAX_MESSAGE_CHARS] if failure else None, Text),
    }
    record = func.jsonb_build_object(*chain.from_iterable(fields.items()), type_=JSONB)
    full = func.jsonb_array_length(jobs.c.attempts) >= MAX_RECORDS
    without_oldest = jobs.c.attempts.op("-", return_type=JSONB())(literal(0, Integer))
    return case((full, without_oldest), else_=jobs.c.attempts).op("||")(record)
