"""Create `batches`, and add a job's batch and its index there."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute(_TABLE)
    op.execute(_MEMBERS)


_TABLE = """
CREATE TABLE batches (
    id              uuid PRIMARY KEY,
    owner           text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    size            integer NOT NULL,
    names           json NOT NULL,
    refusals        json NOT NULL,
    idempotency_key text,
    request_digest  text,

    CONSTRAINT batches_names_whole CHECK (size > 0 AND json_array_length(names) = size),
    CONSTRAINT batches_refusals_bounded CHECK (json_array_length(refusals) <= size)
);
CREATE UNIQUE INDEX batches_idempotency ON batches (owner, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX batches_listing ON batches (owner, created_at DESC, id DESC);
"""

_MEMBERS = """
ALTER TABLE jobs
    ADD COLUMN batch_id uuid REFERENCES batches (id),
    ADD COLUMN batch_index integer,
    ADD CONSTRAINT jobs_batch_whole CHECK (num_nulls(batch_id, batch_index) IN (0, 2));
CREATE UNIQUE INDEX jobs_batch ON jobs (batch_id, batch_index) WHERE batch_id IS NOT NULL;
"""
