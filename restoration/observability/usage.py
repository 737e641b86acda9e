"""GPU usage: the seconds in which engines executed jobs, over all attempts and outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from restoration.jobs import Job


@dataclass(frozen=True, slots=True)
class Usage:
    """Usage of one owner and workflow: `gpu_s` over `attempts` attempts at `jobs` jobs."""

    owner: str
    workflow: str
    jobs: int
    attempts: int
    gpu_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The current attempt of `job` has executed for `gpu_s` seconds so far."""

    job: Job
    gpu_s: float


class UsageLedger(Protocol):
    """Stores the usage of attempts, and keeps it after a job's row is deleted.

    Records are not fenced: an attempt that lost its lease has used the GPU too.
    """

    async def record(self, costs: Sequence[Cost]) -> None:
        """Record the costs of different attempts.

        Call it repeatedly with growing figures; a smaller figure changes nothing. Raises
        DependencyUnavailable.
        """

    async def since(self, since: datetime, owner: str | None = None) -> Sequence[Usage]:
        """Return the usage of attempts that began to execute at or after `since`, largest first.

        Covers all owners, or only `owner`. Raises DependencyUnavailable.
        """
