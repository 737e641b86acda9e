"""Implementations of `restoration.ports` on Postgres, S3 and Redis.

Foreign exceptions are converted here: this package raises only errors of `restoration.errors`.
"""
