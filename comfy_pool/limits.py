"""Timeouts, polling intervals and restart thresholds of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits in seconds unless the name says otherwise. 0 runs or bytes mean no limit."""

    # Timeout of a request: a node or a model load may hold the interpreter lock for a while.
    answer_s: float = 30.0
    probe_s: float = 5.0  # timeout of a probe; an idle engine that exceeds it counts as hung
    recent_s: float = 1.0  # an answer no older than this replaces a probe
    poll_s: float = 5.0  # longest interval between reads of the history while events arrive
    blind_poll_s: float = 0.5  # the interval after the run's websocket was dropped
    stop_poll_s: float = 0.2  # an interrupt can get lost, so it is repeated at this interval
    # An interrupt takes effect at the next node or step; a tile takes up to 30 s on a CPU.
    stop_s: float = 60.0
    unreachable_s: float = 30.0  # an engine without any answer for this long counts as hung
    stall_s: float = 300.0  # a run without any event for this long has stalled: interrupt it
    stall_stop_s: float = 10.0  # the engine is given up if the interrupt has no effect by then

    restart_after_runs: int = 0
    memory_limit_bytes: int = 0  # resident memory of the engine's process tree
    # Pause between two starts, doubled with each start since the last successful run.
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    broken_after_starts: int = 3  # failed starts in a row
