"""Values that many tests need and none of them is about."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from restoration.jobs import Artifact, NewJob, OutputFormat, Priority


def new_job(**changes: Any) -> NewJob:
    """A job ready to be inserted; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "id": uuid4(),
        "owner": "alice",
        "workflow": "restore",
        "workflow_version": "1",
        "params": {},
        "output_format": OutputFormat.PNG,
        "priority": Priority.INTERACTIVE,
        "input": artifact("inputs/1.png"),
        "max_attempts": 3,
    }
    return NewJob(**fields | changes)


def artifact(key: str = "outputs/1/1.png") -> Artifact:
    """An artifact that lies nowhere."""
    return Artifact(key=key, sha256="0" * 64, size_bytes=1, content_type="image/png")
