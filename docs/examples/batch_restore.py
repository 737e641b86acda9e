"""Restore a folder of photos through Ray handles: python batch_restore.py PHOTOS RESULTS

Runs on any machine of the cluster, or beside `restore up`. Each photo's result is written as
soon as it is ready; a photo that cannot be restored is told, and the others go on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from actors.batch import connect
from restoration.jobs import JobStatus

photos, results = Path(sys.argv[1]), Path(sys.argv[2])
results.mkdir(parents=True, exist_ok=True)

with connect(owner="archive") as batch:
    submitted = batch.submit_files(
        sorted(photos.glob("*.jpg")), workflow="enlarge", params={"scale": 2}
    )
    for result in batch.as_completed(submitted):
        photo = submitted[result.job.id]
        if result.job.status is JobStatus.SUCCEEDED:
            result.save(results / f"{photo.stem}.png")
        sys.stdout.write(f"{photo.name}: {result.job.status}\n")
