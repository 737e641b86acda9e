"""Create all tables, and the triggers that count.

Triggers maintain `turns` and `owners` instead of the application. One statement that forgot to
count would leave jobs that are never claimed, or lock an owner out for ever.

Postgres fires triggers in the order of their names. `jobs_account_...` sorts before `jobs_joined`
and `jobs_moved`, so that an owner's row is locked before its turns.
"""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    for part in (_TABLES, _INDEXES, _FUNCTIONS, _ACCOUNTING, _UPLOADS, _TURNS, _HOLDING):
        op.execute(part)


_TABLES = """
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
    queue_deadline_at   timestamptz NOT NULL,
    run_limit_s         double precision,
    retry_of            uuid,
    last_worker         text,
    attempts            jsonb NOT NULL DEFAULT '[]',
    webhook_url         text,
    input_expired_at    timestamptz,
    output_expired_at   timestamptz,
    batch_id            uuid REFERENCES batches (id),
    batch_index         integer,
    keep_metadata       boolean NOT NULL DEFAULT false,
    traceparent         text,
    work_key            bytea,
    reused_from         uuid,

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
        status NOT IN ('running', 'cancelling', 'succeeded') OR reused_from IS NOT NULL
        OR (worker IS NOT NULL AND started_at IS NOT NULL AND attempt > 0)),
    CONSTRAINT jobs_reused_done CHECK (
        reused_from IS NULL OR (status = 'succeeded' AND attempt = 0)),
    CONSTRAINT jobs_waiting_clean CHECK (
        status <> 'queued' OR (worker IS NULL AND started_at IS NULL)),
    CONSTRAINT jobs_attempts_bounded CHECK (
        max_attempts > 0 AND failed_attempts BETWEEN 0 AND least(attempt, max_attempts)),
    CONSTRAINT jobs_batch_whole CHECK (num_nulls(batch_id, batch_index) IN (0, 2))
);

CREATE TABLE deliveries (
    job_id       uuid PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    host         text NOT NULL,
    status       text NOT NULL DEFAULT 'pending',
    tries        integer NOT NULL DEFAULT 0,
    created_at   timestamptz NOT NULL DEFAULT now(),
    next_try_at  timestamptz DEFAULT now(),
    last_error   text,

    CONSTRAINT deliveries_status_known CHECK (status IN ('pending', 'delivered', 'dead')),
    CONSTRAINT deliveries_next_try_at_present CHECK (
        (status = 'pending') = (next_try_at IS NOT NULL))
);

CREATE TABLE turns (
    owner     text NOT NULL,
    priority  smallint NOT NULL,
    waiting   integer NOT NULL,
    counts_as smallint,
    turn_at   timestamptz NOT NULL,
    held      boolean NOT NULL DEFAULT false,
    PRIMARY KEY (owner, priority),

    CONSTRAINT turns_counted CHECK (waiting >= 0 AND (waiting > 0) = (counts_as IS NOT NULL))
) WITH (fillfactor = 50);

CREATE TABLE owners (
    owner        text PRIMARY KEY,
    running      integer NOT NULL DEFAULT 0,
    max_running  integer NOT NULL DEFAULT 0,
    stored_bytes bigint NOT NULL DEFAULT 0,

    CONSTRAINT owners_counted CHECK (running >= 0 AND max_running >= 0 AND stored_bytes >= 0)
) WITH (fillfactor = 50);

CREATE TABLE uploads (
    id         uuid PRIMARY KEY,
    owner      text NOT NULL,
    size_bytes bigint NOT NULL,
    expires_at timestamptz NOT NULL,

    CONSTRAINT uploads_sized CHECK (size_bytes > 0)
);

-- No foreign key to jobs, because their rows are deleted after a time and the usage is kept.
CREATE TABLE gpu_usage (
    job_id   uuid NOT NULL,
    attempt  integer NOT NULL,
    owner    text NOT NULL,
    workflow text NOT NULL,
    began_at timestamptz NOT NULL DEFAULT now(),
    gpu_s    double precision NOT NULL,
    PRIMARY KEY (job_id, attempt),

    CONSTRAINT gpu_usage_counted CHECK (gpu_s >= 0)
) WITH (fillfactor = 70);

CREATE TABLE workers (
    id             text PRIMARY KEY,
    node           text NOT NULL,
    engine_url     text NOT NULL,
    engine         text NOT NULL,
    engine_starts  integer NOT NULL,
    in_hand        jsonb NOT NULL,
    restarts_done  integer NOT NULL,
    drained        boolean NOT NULL DEFAULT false,
    restarts_asked integer NOT NULL DEFAULT 0,
    started_at     timestamptz NOT NULL DEFAULT now(),
    seen_at        timestamptz NOT NULL DEFAULT now(),
    engine_version text NOT NULL DEFAULT ''
) WITH (fillfactor = 50);
"""

_INDEXES = """
CREATE UNIQUE INDEX batches_idempotency ON batches (owner, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX batches_listing ON batches (owner, created_at DESC, id DESC);

CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_waiting ON jobs (owner, priority, created_at, id) WHERE status = 'queued';
CREATE INDEX jobs_unstarted ON jobs (queue_deadline_at) WHERE status = 'queued' AND attempt = 0;
CREATE INDEX jobs_started_again ON jobs (owner, priority)
    WHERE status = 'queued' AND attempt > 0;
CREATE UNIQUE INDEX jobs_retried ON jobs (retry_of) WHERE retry_of IS NOT NULL;
CREATE INDEX jobs_leases ON jobs (lease_until) WHERE status IN ('running', 'cancelling');
CREATE INDEX jobs_listing ON jobs (owner, created_at DESC, id DESC);
CREATE INDEX jobs_inputs_kept ON jobs (finished_at)
    WHERE finished_at IS NOT NULL AND input_expired_at IS NULL;
CREATE INDEX jobs_outputs_kept ON jobs (finished_at)
    WHERE output_key IS NOT NULL AND output_expired_at IS NULL;
CREATE INDEX jobs_rows_left ON jobs (finished_at) WHERE input_expired_at IS NOT NULL;
CREATE INDEX jobs_input ON jobs (input_key) WHERE input_expired_at IS NULL;
CREATE INDEX jobs_results ON jobs (work_key, finished_at)
    WHERE work_key IS NOT NULL AND status = 'succeeded' AND output_expired_at IS NULL;
CREATE UNIQUE INDEX jobs_batch ON jobs (batch_id, batch_index) WHERE batch_id IS NOT NULL;

CREATE INDEX deliveries_due ON deliveries (next_try_at) WHERE status = 'pending';
CREATE INDEX deliveries_due_of_host ON deliveries (host, next_try_at) WHERE status = 'pending';
CREATE INDEX turns_order ON turns (counts_as, turn_at) WHERE counts_as IS NOT NULL AND NOT held;
CREATE INDEX uploads_of_owner ON uploads (owner) INCLUDE (size_bytes);
CREATE INDEX uploads_by_expiry ON uploads (expires_at);
CREATE INDEX gpu_usage_began ON gpu_usage (began_at);
CREATE INDEX gpu_usage_of_owner ON gpu_usage (owner, began_at);
"""

# A retry shares its input with the first job, which counts it; both inputs expire together.
_FUNCTIONS = """
CREATE FUNCTION job_runs(job jobs) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT (job.status IN ('running', 'cancelling'))::integer
$$;

CREATE FUNCTION job_stores(job jobs) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN job.input_expired_at IS NULL AND job.retry_of IS NULL
                THEN job.input_size_bytes ELSE 0 END
         + CASE WHEN job.output_expired_at IS NULL
                THEN coalesce(job.output_size_bytes, 0) ELSE 0 END
$$;

CREATE FUNCTION owner_is_full(which owners) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT which.max_running > 0 AND which.running >= which.max_running
$$;
"""

_ACCOUNTING = """
CREATE FUNCTION jobs_account_new() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO owners AS known (owner, running, stored_bytes)
        SELECT owner, sum(job_runs(job)), sum(job_stores(job))
        FROM arrived AS job GROUP BY owner ORDER BY owner COLLATE "C"
    ON CONFLICT (owner) DO UPDATE SET
        running = known.running + excluded.running,
        stored_bytes = known.stored_bytes + excluded.stored_bytes;
    RETURN NULL;
END
$$;
CREATE TRIGGER jobs_account_new AFTER INSERT ON jobs
    REFERENCING NEW TABLE AS arrived
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_account_new();

CREATE FUNCTION jobs_account_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    more_running integer := job_runs(NEW) - job_runs(OLD);
BEGIN
    UPDATE owners AS known SET
        running = known.running + more_running,
        stored_bytes = known.stored_bytes + job_stores(NEW) - job_stores(OLD)
    WHERE owner = NEW.owner;
    IF more_running > 0 AND EXISTS (
        SELECT FROM owners WHERE owner = NEW.owner AND max_running > 0 AND running > max_running
    ) THEN
        RAISE EXCEPTION 'another claim has taken the last place of %', NEW.owner
            USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER jobs_account_change
    AFTER UPDATE OF status, input_expired_at, output_expired_at ON jobs FOR EACH ROW
    WHEN (job_runs(OLD) <> job_runs(NEW) OR job_stores(OLD) <> job_stores(NEW))
    EXECUTE FUNCTION jobs_account_change();

CREATE FUNCTION jobs_account_end() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE owners AS known SET
        running = known.running - job_runs(OLD),
        stored_bytes = known.stored_bytes - job_stores(OLD)
    WHERE owner = OLD.owner;
    RETURN NULL;
END
$$;
CREATE TRIGGER jobs_account_end AFTER DELETE ON jobs FOR EACH ROW
    WHEN (job_runs(OLD) <> 0 OR job_stores(OLD) <> 0)
    EXECUTE FUNCTION jobs_account_end();
"""

_UPLOADS = """
CREATE FUNCTION uploads_account_new() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO owners AS known (owner, stored_bytes) VALUES (NEW.owner, NEW.size_bytes)
    ON CONFLICT (owner) DO UPDATE SET stored_bytes = known.stored_bytes + excluded.stored_bytes;
    RETURN NULL;
END
$$;
CREATE TRIGGER uploads_account_new AFTER INSERT ON uploads
    FOR EACH ROW EXECUTE FUNCTION uploads_account_new();

CREATE FUNCTION uploads_account_end() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE owners SET stored_bytes = stored_bytes - OLD.size_bytes WHERE owner = OLD.owner;
    RETURN NULL;
END
$$;
CREATE TRIGGER uploads_account_end AFTER DELETE ON uploads
    FOR EACH ROW EXECUTE FUNCTION uploads_account_end();
"""

# A new or returning owner goes before owners that had a turn in the last ten minutes, but after
# those that have waited longer, so that even an endless stream of new owners starves none.
_TURNS = """
CREATE FUNCTION turn_joined(of_owner text, of_priority smallint, jobs_more integer)
RETURNS void LANGUAGE sql AS $$
    INSERT INTO turns AS turn (owner, priority, waiting, counts_as, turn_at, held)
    VALUES (of_owner, of_priority, jobs_more, of_priority,
            clock_timestamp() - interval '10 minutes',
            coalesce((SELECT owner_is_full(o) FROM owners AS o WHERE o.owner = of_owner), false))
    ON CONFLICT (owner, priority) DO UPDATE SET
        waiting = turn.waiting + excluded.waiting,
        counts_as = coalesce(turn.counts_as, excluded.counts_as),
        turn_at = CASE WHEN turn.waiting > 0 THEN turn.turn_at
                       ELSE greatest(turn.turn_at, excluded.turn_at) END
$$;

CREATE FUNCTION jobs_joined() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM turn_joined(owner, priority, count) FROM (
        SELECT owner, priority, count(*)::integer AS count
        FROM arrived WHERE status = 'queued'
        GROUP BY owner, priority ORDER BY owner, priority
    ) AS joined;
    RETURN NULL;
END
$$;
CREATE TRIGGER jobs_joined AFTER INSERT ON jobs
    REFERENCING NEW TABLE AS arrived
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_joined();

CREATE FUNCTION jobs_moved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.status = 'queued' THEN
        PERFORM turn_joined(NEW.owner, NEW.priority, 1);
        RETURN NULL;
    END IF;
    UPDATE turns SET
        waiting = waiting - 1,
        counts_as = CASE WHEN waiting > 1 THEN counts_as END,
        turn_at = CASE WHEN TG_OP = 'UPDATE' AND NEW.status = 'running' THEN clock_timestamp()
                       ELSE turn_at END
    WHERE owner = OLD.owner AND priority = OLD.priority;
    RETURN NULL;
END
$$;
CREATE TRIGGER jobs_moved AFTER UPDATE OF status ON jobs FOR EACH ROW
    WHEN ((OLD.status = 'queued') <> (NEW.status = 'queued'))
    EXECUTE FUNCTION jobs_moved();
CREATE TRIGGER jobs_removed AFTER DELETE ON jobs FOR EACH ROW
    WHEN (OLD.status = 'queued')
    EXECUTE FUNCTION jobs_moved();
"""

# The dispatcher is notified of room for an owner's next job, as of a new job.
_HOLDING = """
CREATE FUNCTION owners_hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM turns WHERE owner = NEW.owner ORDER BY priority FOR UPDATE;
    UPDATE turns SET held = owner_is_full(NEW) WHERE owner = NEW.owner;
    IF FOUND AND NOT owner_is_full(NEW) THEN
        PERFORM pg_notify('comfy_restore_job_waits', '');
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER owners_hold AFTER UPDATE OF running, max_running ON owners FOR EACH ROW
    WHEN (owner_is_full(OLD) <> owner_is_full(NEW))
    EXECUTE FUNCTION owners_hold();
"""
