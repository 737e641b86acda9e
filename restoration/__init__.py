"""The vocabulary that every other package shares: jobs, errors, events, images, settings, ports.

Standard library and pydantic only; nothing here does I/O.
"""
