"""The operators' calls of the Python client; they need the scope `admin`."""

from __future__ import annotations

from serve_app.client.connection import Connection
from serve_app.client.errors import parse
from serve_app.schemas.workers import QueueView, WorkerList, WorkerView

ADMIN = "/api/v1/admin"


class WorkerCalls(Connection):
    def workers(self) -> WorkerList:
        """Return all workers, as of their newest reports."""
        return parse(WorkerList, self._call("GET", f"{ADMIN}/workers"))

    def queue(self) -> QueueView:
        """Return the waiting and the running jobs of each class."""
        return parse(QueueView, self._call("GET", f"{ADMIN}/queue"))

    def drain(self, worker: str) -> WorkerView:
        """Let the worker finish its jobs and claim no more until it is undrained."""
        return self._order(worker, "drain")

    def undrain(self, worker: str) -> WorkerView:
        """Let a drained worker claim jobs again."""
        return self._order(worker, "undrain")

    def restart_engine(self, worker: str) -> WorkerView:
        """Restart the worker's engine as soon as no job runs in it."""
        return self._order(worker, "restart-engine")

    def _order(self, worker: str, order: str) -> WorkerView:
        return parse(WorkerView, self._call("POST", f"{ADMIN}/workers/{worker}/{order}"))
