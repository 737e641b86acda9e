"""Add a job's webhook URL, and create the outbox `deliveries`."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs ADD COLUMN webhook_url text")
    op.execute(_TABLE)
    op.execute("CREATE INDEX deliveries_due ON deliveries (next_try_at) WHERE status = 'pending'")


_TABLE = """
CREATE TABLE deliveries (
    job_id      uuid PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    host        text NOT NULL,
    status      text NOT NULL DEFAULT 'pending',
    tries       integer NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT now(),
    next_try_at timestamptz DEFAULT now(),
    last_error  text,

    CONSTRAINT deliveries_status_known CHECK (status IN ('pending', 'delivered', 'dead')),
    CONSTRAINT deliveries_next_try_at_present CHECK (
        (status = 'pending') = (next_try_at IS NOT NULL))
)
"""
