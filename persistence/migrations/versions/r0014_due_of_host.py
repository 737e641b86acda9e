"""Add an index of due deliveries by host, so that one host's backlog is not sorted for others."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.execute(
        "CREATE INDEX deliveries_due_of_host ON deliveries (host, next_try_at) "
        "WHERE status = 'pending'"
    )
