"""A batch script: `python -m tests.e2e.batch_handles PHOTO...` submits a batch to the cluster at
RAY_ADDRESS, and prints the outcome as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from actors.batch import connect
from restoration.errors import UnknownWorkflow

photos = [Path(name) for name in sys.argv[1:]]
with connect(owner="scanner") as batch:
    try:
        batch.submit_batch(photos, workflow="nope")
    except UnknownWorkflow as error:
        wrong_as_a_whole = error.code
    accepted = batch.submit_batch(photos, workflow="enlarge")
    ended = [result.job.status for result in batch.as_completed(accepted.jobs)]
    standing = batch.batch_status(accepted.id)
    told = {
        "wrong_as_a_whole": wrong_as_a_whole,
        "refused": {path.name: reason.code for path, reason in accepted.refused},
        "ended": ended,
        "with_progress": len(batch.progress(accepted.jobs)),
        "status": standing.status,
        "counts": asdict(standing.counts),
        "unchanged_by_cancel": batch.cancel_batch(accepted.id) == standing,
    }
sys.stdout.write(json.dumps(told))
