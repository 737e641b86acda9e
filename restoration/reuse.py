"""Decide when a stored result answers another job: the same work for the same owner. No I/O.

A result depends on the photo, the workflow and its version, the manifest's parameters, the output
format and whether metadata is kept. A seed is a parameter, with the same default for every job.
Priority, limits and webhook do not change the picture.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum

from restoration.jobs import NewJob


class Reuse(StrEnum):
    ALLOW = "allow"
    NEVER = "never"


def work_key(job: NewJob) -> bytes:
    """Return a sha256 digest that is equal for jobs which one result answers."""
    work = [
        job.owner,
        job.input.sha256,
        job.workflow,
        job.workflow_version,
        dict(job.params),
        job.output_format,
        job.options.keep_metadata,
    ]
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).digest()
