"""Restore a folder of photos through Ray handles: python batch_restore.py PHOTOS RESULTS

Runs on any machine of the cluster, or beside `restore up`; among several clusters RAY_ADDRESS
names the one. Each result is written as soon as it is ready; a photo that cannot be restored is
told, and the others go on. The exit status says if there were any.
"""

from __future__ import annotations

import sys
from pathlib import Path

from actors.batch import connect
from restoration.jobs import JobStatus

photos, results = Path(sys.argv[1]), Path(sys.argv[2])
results.mkdir(parents=True, exist_ok=True)
failed: list[Path] = []


def tell(photo: Path, what: object) -> None:
    sys.stdout.write(f"{photo.name}: {what}\n")


def refused(photo: Path, reason: Exception) -> None:
    failed.append(photo)
    tell(photo, f"refused: {reason}")


with connect(owner="archive") as batch:
    submitted = batch.submit_files(
        sorted(photos.glob("*.jpg")), workflow="enlarge", params={"scale": 2}, on_refused=refused
    )
    for result in batch.as_completed(submitted):
        photo = submitted[result.job.id]
        tell(photo, result.job.status)
        if result.job.status is JobStatus.SUCCEEDED:
            result.save(results / f"{photo.stem}.png")
        else:
            failed.append(photo)

sys.exit(1 if failed else 0)
