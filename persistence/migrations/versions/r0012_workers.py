"""Create `workers`, with their reports and orders. Older code does not use it."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute("""
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
            seen_at        timestamptz NOT NULL DEFAULT now()
        ) WITH (fillfactor = 50)
    """)
