"""Restore a photo and a batch with a client made by openapi-python-client; not a test module.

Run as `python submit.py URL TOKEN OUTPUT PHOTO...`, beside the generated package `client`.
"""

import sys
import time
from pathlib import Path

from client import AuthenticatedClient
from client.api.batches import get_batch, list_batch_items, submit_batch
from client.api.restorations import get_result, submit_restoration
from client.models import (
    BatchStatus,
    JobStatus,
    OutputFormat,
    Restoration,
    SubmitBatchBody,
    SubmitRestorationBody,
)
from client.types import File


def main(url: str, token: str, output: Path, *photos: Path) -> None:
    with AuthenticatedClient(base_url=url, token=token, timeout=60) as client:
        job = submit_restoration.sync(
            client=client,
            body=SubmitRestorationBody(
                image=file_of(photos[0]), output_format=OutputFormat.WEBP, keep_metadata=True
            ),
            prefer="wait=30",
            idempotency_key="one",
        )
        assert isinstance(job, Restoration), job
        assert (job.status, job.output_format) == (JobStatus.SUCCEEDED, OutputFormat.WEBP)
        download(client, job.id, output / "one")

        batch = submit_batch.sync(
            client=client,
            body=SubmitBatchBody(
                image=[file_of(photo) for photo in photos],
                workflow="enlarge",
                params='{"scale": 2}',
                run_limit_s=60.0,
            ),
        )
        assert batch.size == len(photos), batch
        while (now := get_batch.sync(batch.id, client=client)).status is BatchStatus.RUNNING:
            time.sleep(0.1)
        assert now.status is BatchStatus.SUCCEEDED, now
        for item in list_batch_items.sync(batch.id, client=client).items:
            download(client, item.job_id, output / item.name)


def file_of(path: Path) -> File:
    return File(payload=path.open("rb"), file_name=path.name, mime_type="image/png")


def download(client: AuthenticatedClient, job_id: str, to: Path) -> None:
    answer = get_result.sync_detailed(job_id, client=client, download=True)
    assert answer.status_code == 200, answer
    to.write_bytes(answer.content)


if __name__ == "__main__":
    url, token, *paths = sys.argv[1:]
    main(url, token, *map(Path, paths))
