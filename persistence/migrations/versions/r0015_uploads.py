"""Create `uploads`: direct uploads without a job yet, which count as stored by their owner."""

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    for part in (_UPLOADS, _ACCOUNTING):
        op.execute(part)


_UPLOADS = """
CREATE TABLE uploads (
    id         uuid PRIMARY KEY,
    owner      text NOT NULL,
    size_bytes bigint NOT NULL,
    expires_at timestamptz NOT NULL,
    CONSTRAINT uploads_sized CHECK (size_bytes > 0)
);
CREATE INDEX uploads_of_owner ON uploads (owner) INCLUDE (size_bytes);
CREATE INDEX uploads_by_expiry ON uploads (expires_at);
"""

# Triggers as for jobs (0009): one statement that forgot to count would lock its owner out for ever.
_ACCOUNTING = """
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
