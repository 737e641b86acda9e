"""The current tables.

The migrations create this schema; a test compares the two in Postgres' catalogue.
CHECK constraints state what must hold for a row in each status, so that neither code nor a manual
statement can store a job that the rest of the system cannot read.
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

# Claims take the lowest rank first. The gaps leave room for more classes.
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
    # Text with a CHECK instead of a native ENUM, so that a migration can add, rename and drop
    # values in its transaction.
    return CheckConstraint(f"{column} IN ({_listed(kind)})", name=f"jobs_{column}_known")


def _present_in(states: Iterable[JobStatus], column: str) -> CheckConstraint:
    """Return the constraint that `column` is set in these states and null in all others."""
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
    # json keeps numbers as written; jsonb would turn the float 1e22 into an integer
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
    # worker and started_at are those of the current attempt, or of the one that ended the job
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
    # the worker that handed it back with a failure, and cannot claim it for a moment
    Column("last_worker", Text),
    # the ended attempts, see `persistence.postgres.attempts`
    Column("attempts", JSONB, nullable=False, server_default=text("'[]'")),
    Column("webhook_url", Text),
    # from these times on the objects may be deleted
    Column("input_expired_at", DateTime(timezone=True)),
    Column("output_expired_at", DateTime(timezone=True)),
    Column("batch_id", Uuid, ForeignKey("batches.id")),
    Column("batch_index", Integer),
    Column("keep_metadata", Boolean, nullable=False, server_default=text("false")),
    # W3C Trace Context of the submission
    Column("traceparent", Text),
    # see `restoration.reuse`
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
    # Waiting jobs, each owner's oldest first; `turns` has the order of owners.
    Index(
        "jobs_waiting",
        "owner",
        "priority",
        "created_at",
        "id",
        postgresql_where=text("status = 'queued'"),
    ),
    Index(
        "jobs_unstarted",
        "queue_deadline_at",
        postgresql_where=text("status = 'queued' AND attempt = 0"),
    ),
    Index(
        "jobs_started_again",
        "owner",
        "priority",
        postgresql_where=text("status = 'queued' AND attempt > 0"),
    ),
    Index("jobs_retried", "retry_of", unique=True, postgresql_where=text("retry_of IS NOT NULL")),
    Index(
        "jobs_leases", "lease_until", postgresql_where=text("status IN ('running', 'cancelling')")
    ),
    Index("jobs_listing", "owner", text("created_at DESC"), text("id DESC")),
    # For retention: expired objects and rows, and other jobs that need an input (`jobs_input`).
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
        "work_key",
        "finished_at",
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

# The webhook outbox: one row for each ended job with a webhook URL.
deliveries = Table(
    "deliveries",
    metadata,
    Column("job_id", Uuid, ForeignKey(jobs.c.id, ondelete="CASCADE"), primary_key=True),
    Column("host", Text, nullable=False),
    Column("status", Text, nullable=False, server_default=text("'pending'")),
    Column("tries", Integer, nullable=False, server_default=text("0")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # during a try: the time at which it counts as lost
    Column("next_try_at", DateTime(timezone=True), server_default=func.now()),
    Column("last_error", Text),
    CheckConstraint(f"status IN ({_listed(DeliveryStatus)})", name="deliveries_status_known"),
    CheckConstraint(
        "(status = 'pending') = (next_try_at IS NOT NULL)", name="deliveries_next_try_at_present"
    ),
    Index("deliveries_due", "next_try_at", postgresql_where=text("status = 'pending'")),
    Index(
        "deliveries_due_of_host",
        "host",
        "next_try_at",
        postgresql_where=text("status = 'pending'"),
    ),
)

# A row for each owner and class: the number of waiting jobs, and the time of its last turn.
# Triggers on `jobs` (see the migration) maintain it, so that no statement can forget to.
turns = Table(
    "turns",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("priority", _PriorityRank, primary_key=True, autoincrement=False),
    Column("waiting", Integer, nullable=False),
    # the class in which it takes turns; null while no job waits
    Column("counts_as", _PriorityRank),
    Column("turn_at", DateTime(timezone=True), nullable=False),
    # true while the owner's running jobs are at their limit, see `owner_counters`
    Column("held", Boolean, nullable=False, server_default=text("false")),
    CheckConstraint("waiting >= 0 AND (waiting > 0) = (counts_as IS NOT NULL)", "turns_counted"),
    Index(
        "turns_order",
        "counts_as",
        "turn_at",
        postgresql_where=text("counts_as IS NOT NULL AND NOT held"),
    ),
    # every claim and insert updates a row: leave room for the new version in its page
    postgresql_with={"fillfactor": 50},
)

# Counters of each owner over both classes; triggers on `jobs` and `uploads` maintain them.
owners = Table(
    "owners",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("running", Integer, nullable=False, server_default=text("0")),
    # 0: no limit; set by the newest submission
    Column("max_running", Integer, nullable=False, server_default=text("0")),
    Column("stored_bytes", BigInteger, nullable=False, server_default=text("0")),
    CheckConstraint(
        "running >= 0 AND max_running >= 0 AND stored_bytes >= 0", name="owners_counted"
    ),
    postgresql_with={"fillfactor": 50},
)

# Direct uploads without a job yet; triggers add them to their owner's stored bytes.
uploads = Table(
    "uploads",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # when the object may be deleted, some time after its link has expired
    Column("expires_at", DateTime(timezone=True), nullable=False),
    CheckConstraint("size_bytes > 0", name="uploads_sized"),
    Index("uploads_of_owner", "owner", postgresql_include=["size_bytes"]),
    Index("uploads_by_expiry", "expires_at"),
)

# GPU time of each attempt, kept after the job's row is deleted.
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
    # gpu_s is updated while its attempt executes
    postgresql_with={"fillfactor": 70},
)

# The newest report of each worker, and its orders; see `persistence.postgres.workers`.
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
    # updated every second: leave room for the new version in its page
    postgresql_with={"fillfactor": 50},
)

# Batches as submitted; their status is computed from their jobs.
batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("size", Integer, nullable=False),
    # names: one for each photo; refusals: [{"index": ..., "code": ..., "message": ...}]
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
