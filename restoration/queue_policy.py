"""How much may wait, for how long a key is remembered, and when waiting long counts.

Every implementation of the job store is given one policy and keeps to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from restoration.limits.quotas import RETRY_AFTER_S, Quotas, queue_full

__all__ = ["RETRY_AFTER_S", "Load", "QueuePolicy", "versioned"]


def versioned(workflow: str, version: str) -> str:
    """How a worker names one version of a workflow when it claims; a name alone means all."""
    return f"{workflow}@{version}"


@dataclass(frozen=True, slots=True)
class Load:
    """Jobs that wait, in all and of one owner, and the bytes that are stored for that owner."""

    waiting: int
    waiting_of_owner: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """`quotas` are an owner's unless a call brings others; `aging_s`: a batch job that has waited
    for longer takes turns with interactive ones."""

    max_waiting: int = 100_000
    quotas: Quotas = field(default_factory=Quotas)
    idempotency_ttl_s: float = 86_400
    aging_s: float = 600

    def running_limit(self, quotas: Quotas | None, *, is_retry: bool = False) -> int | None:
        """How many of the owner's jobs may run at a time from now on; 0 is no limit.

        None: as many as until now. Whoever sends somebody else's job again brings no quotas.
        """
        if quotas is None and is_retry:
            return None
        return (quotas or self.quotas).running_jobs

    def check_room(self, load: Load, quotas: Quotas | None = None) -> None:
        """Raise QueueFull or StorageFull if `load`, with what is being added, is above a limit."""
        allowed = quotas or self.quotas
        allowed.check_waiting(load.waiting_of_owner)
        if load.waiting > self.max_waiting:
            raise queue_full("the service is full", self.max_waiting)
        allowed.check_stored(load.stored_bytes)
