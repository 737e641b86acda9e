"""When a stored result answers another job: the same work, asked for by the same owner. Pure.

A result depends on the photo, the workflow and its version, and what the manifest calls
parameters; a seed is one of them, with a default that is the same for every job. What a job is
asked for besides, its priority, limits and webhook, changes nothing in the picture.
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
    """sha256 that two jobs share only when one result does for both."""
    work = [
        *(job.owner, job.input.sha256, job.workflow, job.workflow_version),
        *(dict(job.params), job.output_format, job.keep_metadata),
    ]
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).digest()
