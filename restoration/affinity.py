"""Prefer waiting jobs whose models a worker has loaded. No I/O.

A worker passes over the first job in the queue at most once, and prefers it from then on. So each
GPU makes a job wait for at most one job behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

# A claim considers this many turns of the best job's class, and this many of each turn's oldest
# jobs.
WINDOW_TURNS = 8
WINDOW_JOBS = 4
# A worker remembers this many jobs that it passed over. Beyond that it forgets the oldest.
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that could be claimed now."""

    job_id: UUID
    workflow: str


@dataclass(slots=True)
class Affinity:
    """Workflows whose models one worker has loaded, and the jobs it passed over for them."""

    workflows: frozenset[str] = field(default_factory=frozenset)
    others_waited: bool = False  # whether the last call to `order` had more than one candidate
    _passed_over: deque[UUID] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def order(self, candidates: Sequence[Candidate]) -> list[UUID]:
        """Return the candidates' job ids, preferred first. `candidates` are in queue order."""
        self.others_waited = len(candidates) > 1
        if not candidates:
            return []
        best = candidates[0]
        loaded = [each for each in candidates if each.workflow in self.workflows]
        if not loaded or best.job_id in self._passed_over:
            loaded = [best]
        if loaded[0] != best:
            self._passed_over.append(best.job_id)
        others = [each for each in candidates if each not in loaded]
        return [candidate.job_id for candidate in [*loaded, *others]]
