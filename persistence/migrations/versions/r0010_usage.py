"""Create `gpu_usage`, which outlives the jobs' rows, and add each job's trace context.

Only additions: older code writes neither.
"""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.execute(_USAGE)
    op.execute("ALTER TABLE jobs ADD COLUMN traceparent text")


# No foreign key to jobs, because their rows are deleted after a time and the usage is kept.
_USAGE = """
CREATE TABLE gpu_usage (
    job_id   uuid NOT NULL,
    attempt  integer NOT NULL,
    owner    text NOT NULL,
    workflow text NOT NULL,
    began_at timestamptz NOT NULL DEFAULT now(),
    gpu_s    double precision NOT NULL,
    PRIMARY KEY (job_id, attempt),
    CONSTRAINT gpu_usage_counted CHECK (gpu_s >= 0)
) WITH (fillfactor = 70);
CREATE INDEX gpu_usage_began ON gpu_usage (began_at);
CREATE INDEX gpu_usage_of_owner ON gpu_usage (owner, began_at);
"""
