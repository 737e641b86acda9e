"""The pictures of a chaos run: samples, reference results, and the check of all results."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

import numpy as np
from PIL import Image

from restoration.jobs import JobStatus
from serve_app.client import ApiError, RestorationClient
from tests.chaos.journal import Row
from tests.chaos.ledger import Ledger, Sample
from tests.chaos.users import WORKFLOW
from tests.support.photos import PhotoName, degrade, original
from tests.support.stack import Stack

SMALL: tuple[PhotoName, ...] = ("flower", "china", "coffee", "chelsea")
SMALL_SIZE = (96, 72)
# These keep the engine busy a few times as long, so that faults hit running attempts.
BIG: tuple[PhotoName, ...] = ("rocket", "astronaut")
BIG_SIZE = (400, 300)


def make_samples(folder: Path) -> list[Sample]:
    """Write crops of real photos to `folder`, and return them."""
    crops = [(name, degrade(original(name)), SMALL_SIZE) for name in SMALL]
    crops += [(name, original(name), BIG_SIZE) for name in BIG]
    return [_sample(folder / f"{name}.png", photo, size) for name, photo, size in crops]


def _sample(path: Path, photo: Image.Image, size: tuple[int, int]) -> Sample:
    photo.crop((0, 0, *size)).save(path)
    return Sample(path.stem, path, path.read_bytes())


def references(stack: Stack, samples: list[Sample], folder: Path) -> dict[str, bytes]:
    """Return the result of each sample while nothing is broken."""
    results = {}
    with stack.client("reference") as client:
        for sample in samples:
            job = client.wait(client.submit(sample.photo, workflow=WORKFLOW).id)
            out = folder / f"{sample.name}-reference.png"
            client.download(job.id, out)
            results[sample.name] = out.read_bytes()
    return results


def wrong_results(
    stack: Stack,
    ledger: Ledger,
    rows: Mapping[UUID, Row],
    expected: Mapping[str, bytes],
    scratch: Path,
) -> dict[UUID, str]:
    """Download every result as its owner; return why, for each that is missing or differs."""
    owners = {accepted.owner for accepted in ledger.accepted.values()}
    clients = {owner: stack.client(owner) for owner in owners}
    wrong = {}
    try:
        for job_id, accepted in ledger.accepted.items():
            row = rows.get(job_id)
            if row is not None and row.status is JobStatus.SUCCEEDED:
                reason = _fault_of(
                    clients[accepted.owner], job_id, expected[accepted.sample], scratch
                )
                if reason is not None:
                    wrong[job_id] = reason
    finally:
        for client in clients.values():
            client.close()
    return wrong


def _fault_of(
    client: RestorationClient, job_id: UUID, expected: bytes, scratch: Path
) -> str | None:
    out = scratch / f"{job_id}.png"
    try:
        client.download(job_id, out)
    except ApiError as error:
        return f"has no result: {error}"
    data = out.read_bytes()
    out.unlink()
    return None if data == expected or _same_pixels(data, expected) else "has other pixels"


def _same_pixels(a: bytes, b: bytes) -> bool:
    with Image.open(io.BytesIO(a)) as one, Image.open(io.BytesIO(b)) as other:
        return one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))
