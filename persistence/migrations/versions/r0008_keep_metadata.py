"""Add whether a result keeps its photo's EXIF. A constant default rewrites no row."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs ADD COLUMN keep_metadata boolean NOT NULL DEFAULT false")
