"""Atomic file writes."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: readers see all of it or the old file. Raises OSError."""
    draft = path.with_name(f".{uuid4().hex}")  # a suffix to `path.name` could make it too long
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
