"""A batch script on `actors.batch`, run by chaos in its own process.

`python -m tests.chaos.batch_script RAY_ADDRESS PHOTO...` submits a few photos at a time through Ray
handles and waits for them, until its standard input ends. It reports events as JSON lines: {"did":
"connected"}, {"did": "submit"}, {"did": "accepted", "id", "photo"}, {"did": "saw", "id", "status"},
{"did": "trouble", "what"}.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from actors.batch import Batch, connect
from actors.cluster import retry
from restoration.errors import RestorationError
from restoration.jobs import JobOptions, Priority
from restoration.reuse import Reuse

OWNER = "archive"
WORKFLOW = "enlarge"
AT_A_TIME = 3
PATIENCE_S = 600.0  # the same as that of the HTTP users


def tell(did: str, **details: object) -> None:
    sys.stdout.write(json.dumps({"did": did, **details}) + "\n")
    sys.stdout.flush()


def submit(batch: Batch, photos: Sequence[Path]) -> set[UUID]:
    """Submit each photo in a call of its own, and return the ids of the accepted jobs."""
    accepted: set[UUID] = set()
    for photo in photos:
        tell("submit")
        try:
            # In the batch class the jobs of the HTTP users would starve it.
            (job_id,) = batch.submit_files(
                [photo],
                workflow=WORKFLOW,
                options=JobOptions(priority=Priority.INTERACTIVE),
                reuse=Reuse.NEVER,  # so that each job is executed
            )
        except RestorationError as error:
            tell("trouble", what=f"submit through handles: {error.code}")
            continue
        tell("accepted", id=str(job_id), photo=photo.stem)
        accepted.add(job_id)
    return accepted


def see_through(batch: Batch, job_ids: set[UUID]) -> None:
    pause = threading.Event()
    while job_ids:
        try:
            for result in batch.as_completed(set(job_ids)):
                job_ids.discard(result.job.id)
                tell("saw", id=str(result.job.id), status=result.job.status)
        except RestorationError as error:
            tell("trouble", what=f"watch through handles: {error.code}")
            pause.wait(1)


def main(address: str, *photos: str) -> None:
    stop = threading.Event()

    def wait_for_end_of_input() -> None:
        sys.stdin.read()
        stop.set()

    retry.PATIENCE_S = PATIENCE_S
    threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    rounds = itertools.cycle(Path(photo) for photo in photos)
    with connect(OWNER, address) as batch:
        tell("connected")
        while not stop.is_set():
            see_through(batch, submit(batch, list(itertools.islice(rounds, AT_A_TIME))))


if __name__ == "__main__":
    main(*sys.argv[1:])
