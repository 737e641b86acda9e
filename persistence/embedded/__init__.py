"""The local stack: a real Postgres, Redis (Valkey) and S3 (SeaweedFS) from wheels.

`local.LocalServices` is the way in. Nothing is imported here, so that each part stays cheap.
"""
