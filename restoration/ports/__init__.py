"""The ports to Postgres, S3 and Redis, one for each of their readers.

Every implementation raises only errors of `restoration.errors`: DependencyUnavailable if a
dependency cannot be reached. Each port has a contract suite in tests/contracts. The port to
ComfyUI is `restoration.engine_port`.
"""
