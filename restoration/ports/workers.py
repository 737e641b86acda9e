"""The ports to the registry of live workers: their reports and orders, and the queue's state."""

from __future__ import annotations

from typing import Protocol

from restoration.workers import QueueState, WorkerOrders, WorkerReport, WorkerSnapshot, WorkerState


class WorkerReports(Protocol):
    """The registry as a worker sees it."""

    async def report(self, report: WorkerReport) -> WorkerOrders:
        """Record a worker's report and return its orders. Workers call it about once a second."""

    async def leave(self, worker: str) -> None:
        """Remove a worker that shuts down. A lost worker is removed after a time."""


class WorkerRegistry(Protocol):
    """The registry as an operator sees it.

    Orders are kept while their worker is registered. Methods raise WorkerNotFound for an unknown
    worker.
    """

    async def roll(self) -> WorkerSnapshot:
        """Return the workers by node and engine, without those silent for more than a minute."""

    async def drain(self, worker: str, *, drained: bool) -> WorkerState:
        """Drain or undrain a worker. A drained one finishes its jobs and claims no more."""

    async def restart_engine(self, worker: str) -> WorkerState:
        """Order a restart of the worker's engine, which happens when no job is in it."""

    async def queue(self) -> QueueState:
        """Return the numbers of waiting and running jobs of each class."""
