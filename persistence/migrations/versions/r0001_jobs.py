"""Create `jobs`: the queue, its history and its leases in one table."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(_TABLE)
    op.execute(_INDEXES)


_TABLE = """
CREATE TABLE jobs (
    id                  uuid PRIMARY KEY,
    owner               text NOT NULL,
    status              text NOT NULL,
    workflow            text NOT NULL,
    workflow_version    text NOT NULL,
    params              json NOT NULL,
    output_format       text NOT NULL,
    priority            smallint NOT NULL,
    input_key           text NOT NULL,
    input_sha256        text NOT NULL,
    input_size_bytes    bigint NOT NULL,
    input_content_type  text NOT NULL,
    created_at          timestamptz NOT NULL DEFAULT now(),
    available_at        timestamptz NOT NULL DEFAULT now(),
    attempt             integer NOT NULL DEFAULT 0,
    failed_attempts     integer NOT NULL DEFAULT 0,
    max_attempts        integer NOT NULL,
    worker              text,
    lease_until         timestamptz,
    started_at          timestamptz,
    finished_at         timestamptz,
    output_key          text,
    output_sha256       text,
    output_size_bytes   bigint,
    output_content_type text,
    failure_code        text,
    failure_message     text,
    idempotency_key     text,
    request_digest      text,
    timings_s           json NOT NULL DEFAULT '{}',

    CONSTRAINT jobs_status_known CHECK (
        status IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')),
    CONSTRAINT jobs_output_format_known CHECK (output_format IN ('png', 'jpeg', 'webp')),
    CONSTRAINT jobs_lease_until_present CHECK (
        (status IN ('running', 'cancelling')) = (lease_until IS NOT NULL)),
    CONSTRAINT jobs_finished_at_present CHECK (
        (status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CONSTRAINT jobs_output_key_present CHECK (
        (status IN ('succeeded')) = (output_key IS NOT NULL)),
    CONSTRAINT jobs_failure_code_present CHECK (
        (status IN ('failed')) = (failure_code IS NOT NULL)),
    CONSTRAINT jobs_output_whole CHECK (
        num_nulls(output_key, output_sha256, output_size_bytes, output_content_type) IN (0, 4)),
    CONSTRAINT jobs_failure_whole CHECK (
        num_nulls(failure_code, failure_message) IN (0, 2)),
    CONSTRAINT jobs_attempted CHECK (
        status NOT IN ('running', 'cancelling', 'succeeded')
        OR (worker IS NOT NULL AND started_at IS NOT NULL AND attempt > 0)),
    CONSTRAINT jobs_waiting_clean CHECK (
        status <> 'queued' OR (worker IS NULL AND started_at IS NULL)),
    CONSTRAINT jobs_attempts_bounded CHECK (
        max_attempts > 0 AND failed_attempts BETWEEN 0 AND least(attempt, max_attempts))
)
"""

_INDEXES = """
CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_waiting ON jobs (priority, created_at, id) WHERE status = 'queued';
CREATE INDEX jobs_leases ON jobs (lease_until) WHERE status IN ('running', 'cancelling');
CREATE INDEX jobs_listing ON jobs (owner, created_at DESC, id DESC);
"""
