"""Alembic's environment and the revisions, in order of their numbers.

A revision is written in SQL and never edited once it has been released. Revisions go forward
only; the way back is a backup. `persistence.postgres.tables` must say the same as the last one.
"""
