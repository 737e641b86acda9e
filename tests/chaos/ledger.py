"""A record of the submissions of a chaos run's clients, and of the answers that they got."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from restoration.jobs import JobStatus


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo to submit, also stored on disk for the batch script."""

    name: str
    path: Path
    photo: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job whose submission was answered with success."""

    owner: str
    sample: str


@dataclass(slots=True)
class Ledger:
    """Written by many threads, and read after they have ended."""

    submitted: int = 0
    accepted: dict[UUID, Accepted] = field(default_factory=dict)
    seen: list[tuple[UUID, JobStatus]] = field(default_factory=list)
    webhooks: Counter[UUID] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def submits(self) -> None:
        with self._lock:
            self.submitted += 1

    def accepts(self, job_id: UUID, owner: str, sample: str) -> None:
        with self._lock:
            self.accepted[job_id] = Accepted(owner, sample)

    def sees_end(self, job_id: UUID, status: JobStatus) -> None:
        """Note that the service reported this final status to a client."""
        with self._lock:
            self.seen.append((job_id, status))

    def hears_end(self, job_id: UUID, status: JobStatus) -> None:
        """Note that a webhook reported this final status."""
        self.sees_end(job_id, status)
        with self._lock:
            self.webhooks[job_id] += 1

    def without_success(self, owners: Iterable[str]) -> set[str]:
        """Return the owners none of whose jobs was seen to succeed."""
        with self._lock:
            served = {
                self.accepted[job_id].owner
                for job_id, status in self.seen
                if status is JobStatus.SUCCEEDED and job_id in self.accepted
            }
        return set(owners) - served

    def has_trouble(self, what: str) -> None:
        """Count a call that failed although the client retried for as long as it may."""
        with self._lock:
            self.troubles[what] += 1
