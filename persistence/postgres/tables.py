"""The tables as they are now.

The migrations bring a database here step by step; a test compares the two in Postgres' own
catalogue. What must be true of a row in each of its states is a CHECK, so that no code path, and
nobody with psql, can store a job that the rest of the system could not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    TypeDecorator,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB

from restoration.jobs import (
    JobStatus,
    OutputFormat,
    Priority,
)
from restoration.webhooks.messages import DeliveryStatus

metadata = MetaData()

# Ranks leave room between the classes: claims take the lowest first.
_RANKS = {Priority.INTERACTIVE: 10, Priority.BATCH: 20}
_CLASSES = {rank: priority for priority, rank in _RANKS.items()}

OWNED = (JobStatus.RUNNING, JobStatus.CANCELLING)


class _PriorityRank(TypeDecorator[Priority]):
    """A Priority, stored as its rank so that an index can sort by it."""

    impl = SmallInteger
    cache_ok = True

    def process_bind_param(self, value: Priority | None, dialect: Dialect) -> int | None:
        return None if value is None else _RANKS[value]

    def process_result_value(self, value: Any, dialect: Dialect) -> Priority | None:
        return None if value is None else _CLASSES[value]


def _listed(values: Iterable[StrEnum]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def _one_of(column: str, kind: type[StrEnum]) -> CheckConstraint:
    # Text and a CHECK, not a native ENUM: a value can be added, renamed and dropped in one
    # transaction with the rest of a migration.
    return CheckConstraint(f"{column} IN ({_listed(kind)})", name=f"jobs_{column}_known")


def _present_in(states: Iterable[JobStatus], column: str) -> CheckConstraint:
    """`column` is set in these states and in no other."""
    return CheckConstraint(
        f"(status IN ({_listed(states)})) = ({column} IS NOT NULL)", name=f"jobs_{column}_present"
    )


_ATTEMPTED = "worker IS NOT NULL AND started_at IS NOT NULL AND attempt > 0"

jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("workflow", Text, nullable=False),
    Column("workflow_version", Text, nullable=False),
    # json keeps numbers as they were written; jsonb would turn 1e22 from a float into an integer
    Column("params", JSON, nullable=False),
    Column("output_format", Text, nullable=False),
    Column("priority", _PriorityRank, nullable=False),
    Column("input_key", Text, nullable=False),
    Column("input_sha256", Text, nullable=False),
    Column("input_size_bytes", BigInteger, nullable=False),
    Column("input_content_type", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("available_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("failed_attempts", Integer, nullable=False, server_default=text("0")),
    Column("max_attempts", Integer, nullable=False),
    # worker and started_at are those of the attempt that runs, or that ended the job
    Column("worker", Text),
    Column("lease_until", DateTime(timezone=True)),
    Column("started_at", DateTime(timezone=True)),
    Column("finished_at", DateTime(timezone=True)),
    Column("output_key", Text),
    Column("output_sha256", Text),
    Column("output_size_bytes", BigInteger),
    Column("output_content_type", Text),
    Column("failure_code", Text),
    Column("failure_message", Text),
    Column("idempotency_key", Text),
    Column("request_digest", Text),
    Column("timings_s", JSON, nullable=False, server_default=text("'{}'")),
    Column("queue_deadline_at", DateTime(timezone=True), nullable=False),
    Column("run_limit_s", Double),
    Column("retry_of", Uuid),
    # the worker that handed it back, to be passed over for a moment
    Column("last_worker", Text),
    # the attempts that are over, see `persistence.postgres.attempts`
    Column("attempts", JSONB, nullable=False, server_default=text("'[]'")),
    Column("webhook_url", Text),
    # from then on nobody may count on the object
    Column("input_expired_at", DateTime(timezone=True)),
    Column("output_expired_at", DateTime(timezone=True)),
    Column("batch_id", Uuid, ForeignKey("batches.id")),
    Column("batch_index", Integer),
    Column("keep_metadata", Boolean, nullable=False, server_default=text("false")),
    # W3C Trace Context, of the request that submitted it
    Column("traceparent", Text),
    # see `restoration.reuse`; no key for jobs from before there were any
    Column("work_key", LargeBinary),
    Column("reused_from", Uuid),
    _one_of("status", JobStatus),
    _one_of("output_format", OutputFormat),
    _present_in(OWNED, "lease_until"),
    _present_in((s for s in JobStatus if s.is_final), "finished_at"),
    _present_in((JobStatus.SUCCEEDED,), "output_key"),
    _present_in((JobStatus.FAILED,), "failure_code"),
    CheckConstraint(
        "num_nulls(output_key, output_sha256, output_size_bytes, output_content_type) IN (0, 4)",
        name="jobs_output_whole",
    ),
    CheckConstraint("num_nulls(failure_code, failure_message) IN (0, 2)", "jobs_failure_whole"),
    CheckConstraint(
        "status NOT IN ('running', 'cancelling', 'succeeded') OR reused_from IS NOT NULL "
        f"OR ({_ATTEMPTED})",
        name="jobs_attempted",
    ),
    CheckConstraint(
        "reused_from IS NULL OR (status = 'succeeded' AND attempt = 0)", name="jobs_reused_done"
    ),
    CheckConstraint(
        "status <> 'queued' OR (worker IS NULL AND started_at IS NULL)", name="jobs_waiting_clean"
    ),
    CheckConstraint(
        "max_attempts > 0 AND failed_attempts BETWEEN 0 AND least(attempt, max_attempts)",
        name="jobs_attempts_bounded",
    ),
    Index(
        "jobs_idempotency",
        "owner",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    # What waits, each owner's oldest first; whose turn it is, `turns` says.
    Index(
        "jobs_waiting",
        *("owner", "priority", "created_at", "id"),
        postgresql_where=text("status = 'queued'"),
    ),
    Index(
        "jobs_unstarted",
        "queue_deadline_at",
        postgresql_where=text("status = 'queued' AND attempt = 0"),
    ),
    Index(
        "jobs_started_again",
        *("owner", "priority"),
        postgresql_where=text("status = 'queued' AND attempt > 0"),
    ),
    Index("jobs_retried", "retry_of", unique=True, postgresql_where=text("retry_of IS NOT NULL")),
    Index(
        "jobs_leases", "lease_until", postgresql_where=text("status IN ('running', 'cancelling')")
    ),
    Index("jobs_listing", "owner", text("created_at DESC"), text("id DESC")),
    # For the sweeper: whose time is up, and who else needs an input.
    Index(
        "jobs_inputs_kept",
        "finished_at",
        postgresql_where=text("finished_at IS NOT NULL AND input_expired_at IS NULL"),
    ),
    Index(
        "jobs_outputs_kept",
        "finished_at",
        postgresql_where=text("output_key IS NOT NULL AND output_expired_at IS NULL"),
    ),
    Index("jobs_rows_left", "finished_at", postgresql_where=text("input_expired_at IS NOT NULL")),
    Index("jobs_input", "input_key", postgresql_where=text("input_expired_at IS NULL")),
    Index(
        "jobs_results",
        *("work_key", "finished_at"),
        postgresql_where=text(
            "work_key IS NOT NULL AND status = 'succeeded' AND output_expired_at IS NULL"
        ),
    ),
    CheckConstraint("num_nulls(batch_id, batch_index) IN (0, 2)", name="jobs_batch_whole"),
    Index(
        "jobs_batch",
        "batch_id",
        "batch_index",
        unique=True,
        postgresql_where=text("batch_id IS NOT NULL"),
    ),
)

# The outbox of webhooks: one row for each job that has ended and asked for one.
deliveries = Table(
    "deliveries",
    metadata,
    Column("job_id", Uuid, ForeignKey(jobs.c.id, ondelete="CASCADE"), primary_key=True),
    Column("host", Text, nullable=False),
    Column("status", Text, nullable=False, server_default=text("'pending'")),
    Column("tries", Integer, nullable=False, server_default=text("0")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # while a try is under way: when it is given up for lost
    Column("next_try_at", DateTime(timezone=True), server_default=func.now()),
    Column("last_error", Text),
    CheckConstraint(f"status IN ({_listed(DeliveryStatus)})", name="deliveries_status_known"),
    CheckConstraint(
        "(status = 'pending') = (next_try_at IS NOT NULL)", name="deliveries_next_try_at_present"
    ),
    Index("deliveries_due", "next_try_at", postgresql_where=text("status = 'pending'")),
    Index(
        "deliveries_due_of_host",
        *("host", "next_try_at"),
        postgresql_where=text("status = 'pending'"),
    ),
)

# A row for each owner with jobs waiting in a class: how many, and when it had its last turn.
# Triggers on `jobs` keep it (see the migration), so that no statement can forget to.
turns = Table(
    "turns",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("priority", _PriorityRank, primary_key=True, autoincrement=False),
    Column("waiting", Integer, nullable=False),
    # as which class it takes turns; null while nothing waits
    Column("counts_as", _PriorityRank),
    Column("turn_at", DateTime(timezone=True), nullable=False),
    # while as many of the owner's jobs run as may, see `persistence.postgres.owner_counters`
    Column("held", Boolean, nullable=False, server_default=text("false")),
    CheckConstraint("waiting >= 0 AND (waiting > 0) = (counts_as IS NOT NULL)", "turns_counted"),
    Index(
        "turns_order",
        *("counts_as", "turn_at"),
        postgresql_where=text("counts_as IS NOT NULL AND NOT held"),
    ),
    # every claim and every insert updates a row in place
    postgresql_with={"fillfactor": 50},
)

# What an owner has, whatever its state; triggers on `jobs` keep it as well.
owners = Table(
    "owners",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("running", Integer, nullable=False, server_default=text("0")),
    # 0: any number; that of the newest submission
    Column("max_running", Integer, nullable=False, server_default=text("0")),
    Column("stored_bytes", BigInteger, nullable=False, server_default=text("0")),
    CheckConstraint(
        "running >= 0 AND max_running >= 0 AND stored_bytes >= 0", name="owners_counted"
    ),
    postgresql_with={"fillfactor": 50},
)

# Direct uploads that no job was made of yet; triggers add them to what their owner has stored.
uploads = Table(
    "uploads",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # when the object may be removed, which is later than the end of its link
    Column("expires_at", DateTime(timezone=True), nullable=False),
    CheckConstraint("size_bytes > 0", name="uploads_sized"),
    Index("uploads_of_owner", "owner", postgresql_include=["size_bytes"]),
    Index("uploads_by_expiry", "expires_at"),
)

# What each attempt has cost; kept when the job's row goes.
gpu_usage = Table(
    "gpu_usage",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("owner", Text, nullable=False),
    Column("workflow", Text, nullable=False),
    Column("began_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("gpu_s", Double, nullable=False),
    CheckConstraint("gpu_s >= 0", name="gpu_usage_counted"),
    Index("gpu_usage_began", "began_at"),
    Index("gpu_usage_of_owner", "owner", "began_at"),
    # a figure grows while its attempt executes
    postgresql_with={"fillfactor": 70},
)

# The last report of each worker, and its orders; see `persistence.postgres.workers`.
workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("node", Text, nullable=False),
    Column("engine_url", Text, nullable=False),
    Column("engine", Text, nullable=False),
    Column("engine_starts", Integer, nullable=False),
    Column("in_hand", JSONB, nullable=False),
    Column("restarts_done", Integer, nullable=False),
    Column("drained", Boolean, nullable=False, server_default=text("false")),
    Column("restarts_asked", Integer, nullable=False, server_default=text("0")),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("engine_version", Text, nullable=False, server_default=text("''")),
    # written once a second: room for the next version beside the last
    postgresql_with={"fillfactor": 50},
)

# What a batch was given; how it stands is in its jobs alone.
batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("size", Integer, nullable=False),
    # one for each photo, and [{"index": ..., "code": ..., "message": ...}] for those without a job
    Column("names", JSON, nullable=False),
    Column("refusals", JSON, nullable=False),
    Column("idempotency_key", Text),
    Column("request_digest", Text),
    CheckConstraint("size > 0 AND json_array_length(names) = size", name="batches_names_whole"),
    CheckConstraint("json_array_length(refusals) <= size", name="batches_refusals_bounded"),
    Index(
        "batches_idempotency",
        "owner",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index("batches_listing", "owner", text("created_at DESC"), text("id DESC")),
)
