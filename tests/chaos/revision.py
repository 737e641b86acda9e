"""Which state of the code a report is about, and when it was made."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Revision:
    """`commit` ends in -dirty when there were changes beyond it; `date` is UTC's."""

    commit: str
    date: str

    @classmethod
    def now(cls, root: Path = ROOT) -> Revision:
        return cls(_commit(root), datetime.now(UTC).date().isoformat())


def _commit(root: Path) -> str:
    """ "unknown" for a copy without its history."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()
