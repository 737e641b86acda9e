"""Alembic's entry point: run the revisions on the connection that `migrate` has opened."""

from alembic import context

from persistence.postgres.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
