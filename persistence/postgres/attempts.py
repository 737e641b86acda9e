"""A job's attempts that are over: a JSON array in its row, appended to by the UPDATE that ends one.

In the row, not in a table of their own: they are read with the job, and go when it goes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Integer, Text, case, func, literal
from sqlalchemy.dialects.postgresql import JSONB

from persistence.postgres.tables import jobs
from restoration.jobs import MAX_RECORDS, AttemptOutcome, Failure

# A row keeps one for each of its attempts; that which ends the job is whole, in its own columns.
_MAX_MESSAGE_CHARS = 1_000


def with_attempt(outcome: AttemptOutcome, failure: Failure | None = None) -> ColumnElement[Any]:
    """`jobs.attempts` and the attempt that the row names now; the oldest goes when it is full."""
    record = func.jsonb_build_object(
        *("attempt", jobs.c.attempt),
        *("worker", jobs.c.worker),
        *("started_at", jobs.c.started_at),
        *("ended_at", func.now()),
        *("outcome", _text(outcome)),
        *("code", _text(failure.code if failure else None)),
        *("message", _text(failure.message[:_MAX_MESSAGE_CHARS] if failure else None)),
        type_=JSONB,
    )
    full = func.jsonb_array_length(jobs.c.attempts) >= MAX_RECORDS
    without_oldest = jobs.c.attempts.op("-", return_type=JSONB())(literal(0, Integer))
    return case((full, without_oldest), else_=jobs.c.attempts).op("||")(record)


def _text(value: str | None) -> ColumnElement[str | None]:
    return literal(value, Text)
