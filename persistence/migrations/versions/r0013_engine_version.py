"""Add the version of a worker's engine, which is empty for older workers."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.execute("ALTER TABLE workers ADD COLUMN engine_version text NOT NULL DEFAULT ''")
