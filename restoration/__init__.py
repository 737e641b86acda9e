"""Types that every other package shares: jobs, errors, events, images, settings and ports.

Depends on the standard library and pydantic only. Only `files`, `processes`
and `settings`, which reads secrets from files, do I/O.
"""
