"""The local stack: a real Postgres, Redis (Valkey) and S3 (SeaweedFS) from wheels.

`local.LocalServices` is the entry point. Nothing is imported here, so that importing one module
does not load the others.
"""
