"""Limits of the queue, the lifetime of idempotency keys, and the age that promotes batch jobs.

Every implementation of the job store takes one policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from restoration.limits.quotas import Quotas, queue_full


def versioned(workflow: str, version: str) -> str:
    """Return the name with which a worker claims one version of a workflow."""
    return f"{workflow}@{version}"


@dataclass(frozen=True, slots=True)
class Load:
    """Waiting jobs, of all owners and of one, and the bytes stored for that owner."""

    waiting: int
    waiting_of_owner: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The policy of a job store.

    `quotas` apply to each owner unless a call passes others. A batch job that has waited longer
    than `aging_s` takes turns with interactive ones.
    """

    max_waiting: int = 100_000
    quotas: Quotas = field(default_factory=Quotas)
    idempotency_ttl_s: float = 86_400
    aging_s: float = 600

    def running_limit(self, quotas: Quotas | None, *, is_retry: bool = False) -> int | None:
        """Return the owner's new limit on running jobs (0: no limit), or None to keep the old one.

        A retry without quotas keeps it: the caller may be someone else than the job's owner.
        """
        if quotas is None and is_retry:
            return None
        return (quotas or self.quotas).running_jobs

    def check_room(self, load: Load, quotas: Quotas | None = None) -> None:
        """Raise QueueFull or StorageFull if `load`, including the addition, exceeds a limit."""
        allowed = quotas or self.quotas
        allowed.check_waiting(load.waiting_of_owner)
        if load.waiting > self.max_waiting:
            raise queue_full("the queue of the service is full", self.max_waiting)
        allowed.check_stored(load.stored_bytes)
