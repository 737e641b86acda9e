"""Parse package locks as written by `uv pip compile --generate-hashes`."""

from __future__ import annotations

import re


def pins(lock: str) -> list[str]:
    """Return each requirement with its marker and without its hashes."""
    return [requirement for requirement, _ in _entries(lock)]


def unhashed(lock: str) -> list[str]:
    """Return the requirements without hashes, which any file would satisfy."""
    return [requirement for requirement, hashes in _entries(lock) if not hashes]


def _entries(lock: str) -> list[tuple[str, list[str]]]:
    lines = lock.replace("\\\n", "").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    return [
        (entry.partition(" --hash=")[0].strip(), re.findall("--hash=sha256:[0-9a-f]{64}", entry))
        for entry in entries
    ]
