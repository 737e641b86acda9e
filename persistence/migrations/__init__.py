"""Alembic's environment and the numbered revisions.

A revision is written in SQL and never edited after its release. There are no downgrades: restore a
backup instead. `persistence.postgres.tables` must match the schema after the last revision.
"""
