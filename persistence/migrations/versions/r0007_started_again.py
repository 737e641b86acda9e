"""Add an index of jobs that have been started and wait again."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute(_INDEX)


_INDEX = """
CREATE INDEX jobs_started_again ON jobs (owner, priority)
    WHERE status = 'queued' AND attempt > 0;
"""
