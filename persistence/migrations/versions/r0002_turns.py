"""Create `turns`, and add a job's history, deadlines and retries.

Triggers maintain `turns` instead of the application: one statement that forgot to count would leave
jobs that are never claimed.
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute(_JOBS)
    op.execute(_TURNS)
    op.execute(_JOINED)
    op.execute(_MOVED)


_JOBS = """
ALTER TABLE jobs
    ADD COLUMN queue_deadline_at timestamptz NOT NULL DEFAULT now() + interval '1 day',
    ADD COLUMN run_limit_s double precision,
    ADD COLUMN retry_of uuid,
    ADD COLUMN last_worker text,
    ADD COLUMN attempts jsonb NOT NULL DEFAULT '[]';
ALTER TABLE jobs ALTER COLUMN queue_deadline_at DROP DEFAULT;

DROP INDEX jobs_waiting;
CREATE INDEX jobs_waiting ON jobs (owner, priority, created_at, id) WHERE status = 'queued';
CREATE INDEX jobs_unstarted ON jobs (queue_deadline_at)
    WHERE status = 'queued' AND attempt = 0;
CREATE UNIQUE INDEX jobs_retried ON jobs (retry_of) WHERE retry_of IS NOT NULL;
"""

# A new or returning owner goes before owners that had a turn in the last ten minutes, but after
# those that have waited longer, so that even an endless stream of new owners starves none.
_TURNS = """
CREATE TABLE turns (
    owner      text NOT NULL,
    priority   smallint NOT NULL,
    waiting    integer NOT NULL,
    counts_as  smallint,
    turn_at    timestamptz NOT NULL,
    PRIMARY KEY (owner, priority),
    CONSTRAINT turns_counted CHECK (
        waiting >= 0 AND (waiting > 0) = (counts_as IS NOT NULL))
) WITH (fillfactor = 50);
CREATE INDEX turns_order ON turns (counts_as, turn_at) WHERE counts_as IS NOT NULL;

INSERT INTO turns (owner, priority, waiting, counts_as, turn_at)
    SELECT owner, priority, count(*), priority, now() - interval '10 minutes'
    FROM jobs WHERE status = 'queued' GROUP BY owner, priority;

CREATE FUNCTION turn_joined(of_owner text, of_priority smallint, jobs_more integer)
RETURNS void LANGUAGE sql AS $$
    INSERT INTO turns AS turn (owner, priority, waiting, counts_as, turn_at)
    VALUES (of_owner, of_priority, jobs_more, of_priority,
            clock_timestamp() - interval '10 minutes')
    ON CONFLICT (owner, priority) DO UPDATE SET
        waiting = turn.waiting + excluded.waiting,
        counts_as = coalesce(turn.counts_as, excluded.counts_as),
        turn_at = CASE WHEN turn.waiting > 0 THEN turn.turn_at
                       ELSE greatest(turn.turn_at, excluded.turn_at) END
$$;
"""

_JOINED = """
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
"""

_MOVED = """
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
