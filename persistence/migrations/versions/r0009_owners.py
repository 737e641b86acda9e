"""Create `owners` with counters of running jobs and stored bytes, and hold turns at the limit.

As with turns, triggers count: one statement that forgot to would lock its owner out for ever.
Postgres fires triggers in the order of their names. These names sort before those of the turns'
triggers, so that an owner's row is locked before its turns.
"""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    for part in (_OWNERS, _FUNCTIONS, _ACCOUNTING, _HOLDING, _BACKFILL):
        op.execute(part)


_OWNERS = """
CREATE TABLE owners (
    owner        text PRIMARY KEY,
    running      integer NOT NULL DEFAULT 0,
    max_running  integer NOT NULL DEFAULT 0,
    stored_bytes bigint NOT NULL DEFAULT 0,
    CONSTRAINT owners_counted CHECK (running >= 0 AND max_running >= 0 AND stored_bytes >= 0)
) WITH (fillfactor = 50);

ALTER TABLE turns ADD COLUMN held boolean NOT NULL DEFAULT false;
DROP INDEX turns_order;
CREATE INDEX turns_order ON turns (counts_as, turn_at) WHERE counts_as IS NOT NULL AND NOT held;
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

CREATE OR REPLACE FUNCTION turn_joined(of_owner text, of_priority smallint, jobs_more integer)
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
"""

# Creating the triggers blocks writers until the commit, so that no row is missed or counted twice.
_BACKFILL = """
INSERT INTO owners (owner, running, stored_bytes)
    SELECT owner, sum(job_runs(job)), sum(job_stores(job)) FROM jobs AS job GROUP BY owner;
"""
