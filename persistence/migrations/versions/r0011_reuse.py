"""Add `work_key`, to find a result that answers a later job, and `reused_from`.

No row is rewritten. The table is scanned twice, for the constraints and for the index, which is
empty at first. Jobs that older code inserts have no key and are not found.
"""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.execute(_JOBS)
    op.execute(_INDEX)


_JOBS = """
ALTER TABLE jobs
    ADD COLUMN work_key bytea,
    ADD COLUMN reused_from uuid,
    DROP CONSTRAINT jobs_attempted,
    ADD CONSTRAINT jobs_attempted CHECK (
        status NOT IN ('running', 'cancelling', 'succeeded') OR reused_from IS NOT NULL
        OR (worker IS NOT NULL AND started_at IS NOT NULL AND attempt > 0)),
    ADD CONSTRAINT jobs_reused_done CHECK (
        reused_from IS NULL OR (status = 'succeeded' AND attempt = 0))
"""

_INDEX = """
CREATE INDEX jobs_results ON jobs (work_key, finished_at)
    WHERE work_key IS NOT NULL AND status = 'succeeded' AND output_expired_at IS NULL
"""
