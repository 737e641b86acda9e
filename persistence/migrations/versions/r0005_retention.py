"""Add the times at which inputs and outputs expired, and the indexes for retention."""

from alembic import op

revision = "0005"
down_revision = "0003"


def upgrade() -> None:
    op.execute(
        "ALTER TABLE jobs ADD COLUMN input_expired_at timestamptz,"
        " ADD COLUMN output_expired_at timestamptz"
    )
    op.execute(_INDEXES)


_INDEXES = """
CREATE INDEX jobs_inputs_kept ON jobs (finished_at)
    WHERE finished_at IS NOT NULL AND input_expired_at IS NULL;
CREATE INDEX jobs_outputs_kept ON jobs (finished_at)
    WHERE output_key IS NOT NULL AND output_expired_at IS NULL;
CREATE INDEX jobs_rows_left ON jobs (finished_at) WHERE input_expired_at IS NOT NULL;
CREATE INDEX jobs_input ON jobs (input_key) WHERE input_expired_at IS NULL;
"""
