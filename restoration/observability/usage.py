"""What jobs cost: seconds in which an engine executed them, of every attempt, however it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from restoration.jobs import Job


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one owner and workflow: `gpu_s` is the sum over `attempts` attempts of `jobs` jobs."""

    owner: str
    workflow: str
    jobs: int
    attempts: int
    gpu_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The attempt of `job` has executed for `gpu_s` seconds in all."""

    job: Job
    gpu_s: float


class UsageLedger(Protocol):
    """Keeps what attempts cost, and keeps it when a job's row is gone.

    Not fenced: an attempt that has lost its job has cost all the same.
    """

    async def record(self, costs: Sequence[Cost]) -> None:
        """Of different attempts. May be told again and again; a smaller figure changes nothing.
        Raises DependencyUnavailable."""

    async def since(self, since: datetime, owner: str | None = None) -> Sequence[Usage]:
        """Sums over attempts that began to execute at or after `since`, of all owners or of one;
        the largest first. Raises DependencyUnavailable."""
