"""The commit that a report is about, and the date of the report."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Revision:
    """`commit` ends in -dirty if there were uncommitted changes; `date` is in UTC."""

    commit: str
    date: str

    @classmethod
    def now(cls, root: Path = ROOT) -> Revision:
        return cls(_commit(root), datetime.now(UTC).date().isoformat())


def _commit(root: Path) -> str:
    """Return the commit, or "unknown" for a copy without git history."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()
