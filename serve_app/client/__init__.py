"""The Python client of the HTTP API."""

from serve_app.client.client import API, ApiError, RestorationClient

__all__ = ["API", "ApiError", "RestorationClient"]
