"""The vocabulary that every other package shares: jobs, errors, events, images, settings, ports.

Standard library and pydantic only. No I/O but that of `files`, and of `settings`, which reads
secrets from files.
"""
