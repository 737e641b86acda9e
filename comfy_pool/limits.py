"""How patient an engine's user is, and when an engine is started anew. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Seconds, unless the name says otherwise; 0 runs or bytes mean no limit."""

    # A node may hold the interpreter's lock meanwhile, or a model load.
    answer_s: float = 30.0
    probe_s: float = 5.0  # an idle engine that takes longer to say it is well is hung
    recent_s: float = 1.0  # an answer no older than this is as good as a probe
    poll_s: float = 5.0  # history is read at least this often, whatever the events say
    blind_poll_s: float = 0.5  # the same without events: after the run's socket was dropped
    stop_poll_s: float = 0.2  # an interrupt can get lost, and is repeated this often
    # An interrupt works at the next node or step; one tile on a CPU takes up to half a minute.
    stop_s: float = 60.0
    unreachable_s: float = 30.0  # an engine that answers nothing for so long is hung
    stall_s: float = 300.0  # and so is one that runs a prompt and tells nothing of it
    stall_stop_s: float = 10.0  # unless an interrupt ends that prompt

    restart_after_runs: int = 0
    memory_limit_bytes: int = 0  # of the engine's whole process tree
    # Between two starts; doubled with each start since a run last succeeded.
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    broken_after_starts: int = 3  # that failed in a row
