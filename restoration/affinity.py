"""Which of the best waiting jobs a worker prefers: one whose models are loaded. Pure.

A worker passes over a job once at most, and then takes it before any other. So each GPU makes a
job wait for at most one that came after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

# What is looked at: so many turns of the best's class, and of each the oldest jobs.
WINDOW_TURNS = 8
WINDOW_JOBS = 4
# Jobs that were passed over, and are not again; with more of them the first is forgotten.
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that could be claimed now."""

    job_id: UUID
    workflow: str


@dataclass(slots=True)
class Affinity:
    """What one worker has loaded: the workflows that need no other models."""

    workflows: frozenset[str] = field(default_factory=frozenset)
    others_waited: bool = False  # besides the one that was claimed last
    _passed_over: deque[UUID] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def order(self, candidates: Sequence[Candidate]) -> list[UUID]:
        """The candidates, which come in the order of turns, in the order of preference."""
        self.others_waited = len(candidates) > 1
        if not candidates:
            return []
        best = candidates[0]
        loaded = [each for each in candidates if each.workflow in self.workflows]
        if not loaded or best.job_id in self._passed_over:
            loaded = [best]
        if loaded[0] != best:
            self._passed_over.append(best.job_id)
        return _ids([*loaded, *(each for each in candidates if each not in loaded)])


def _ids(candidates: Iterable[Candidate]) -> list[UUID]:
    return [candidate.job_id for candidate in candidates]
