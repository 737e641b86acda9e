"""Files that appear whole."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which has all of it then or is as it was. Raises OSError."""
    draft = path.with_name(f".{uuid4().hex}")  # no longer than any name may be
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
