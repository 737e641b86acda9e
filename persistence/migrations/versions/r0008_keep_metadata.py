"""Whether a job's result gets the EXIF of its photo. A constant default: no row is rewritten."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs ADD COLUMN keep_metadata boolean NOT NULL DEFAULT false")
