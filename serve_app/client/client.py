"""The Python client of the HTTP API: blocking, typed, and safe to retry.

Temporary failures (no connection, 429, 502, 503, 504) are retried until `retry_for_s` has passed. A
submission carries an idempotency key, so that a retry cannot create a second job. Every failure is
an ApiError. The final state comes from polling; events only make it known sooner.
"""

from __future__ import annotations

from datetime import datetime

from serve_app.client.batches import BatchCalls
from serve_app.client.errors import ApiError, parse
from serve_app.client.restorations import API, RestorationCalls
from serve_app.client.workers import WorkerCalls
from serve_app.schemas.restorations import UsageReport, WorkflowList, WorkflowView

__all__ = ["API", "ApiError", "RestorationClient"]


class RestorationClient(RestorationCalls, BatchCalls, WorkerCalls):
    """A client of one service, with one token. Close it, or use it as a context manager."""

    def workflows(self) -> tuple[WorkflowView, ...]:
        """Return the workflows that the service offers, each with its parameters' JSON Schema."""
        return parse(WorkflowList, self._call("GET", "/api/v1/workflows")).workflows

    def usage(self, since: datetime) -> UsageReport:
        """Return the usage since then, of the token's owner or, with the scope `admin`, of all."""
        query = {"since": since.isoformat()}
        return parse(UsageReport, self._call("GET", "/api/v1/usage", params=query))
