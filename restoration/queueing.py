"""How much may wait, for how long a key is remembered, and when waiting long counts.

Every implementation of the job store is given one policy and keeps to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from restoration.errors import QueueFull

# What a client is told to wait before it sends again: by then a few jobs have ended.
RETRY_AFTER_S = 10


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """`aging_s`: a batch job that has waited for longer takes turns with interactive ones."""

    max_waiting: int = 100_000
    max_waiting_per_owner: int = 10_000
    idempotency_ttl_s: float = 86_400
    aging_s: float = 600

    def check_room(self, waiting: int, waiting_of_owner: int) -> None:
        """Raise QueueFull if more jobs wait than may; the counts include what is being added."""
        if waiting_of_owner > self.max_waiting_per_owner:
            raise _full("as many of your jobs wait as may", self.max_waiting_per_owner)
        if waiting > self.max_waiting:
            raise _full("the service is full", self.max_waiting)


def _full(what: str, limit: int) -> QueueFull:
    return QueueFull(
        f"{what} ({limit}); send it again later", limit=limit, retry_after_s=RETRY_AFTER_S
    )
