"""Which ComfyUI a worker's engine is. Workers of before do not say, and need not."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.execute("ALTER TABLE workers ADD COLUMN engine_version text NOT NULL DEFAULT ''")
