"""Postgres, S3 and Redis behind the ports of `restoration.ports`, and nothing else.

Foreign exceptions end here: what leaves this package is an error of `restoration.errors`.
"""
