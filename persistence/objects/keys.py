"""The keys of our objects: made here, and read back here, only."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from uuid import UUID, uuid4

from restoration.images import ImageType
from restoration.jobs import AttemptRef, OutputFormat

_SUFFIXES = {
    ImageType.JPEG: "jpg",
    ImageType.PNG: "png",
    ImageType.WEBP: "webp",
    ImageType.TIFF: "tif",
    ImageType.BMP: "bmp",
    ImageType.HEIC: "heic",
    ImageType.AVIF: "avif",
}
INPUTS, OUTPUTS, UPLOADS = "inputs/", "outputs/", "uploads/"
_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_OURS = re.compile(rf"(?:{INPUTS}|{OUTPUTS}(?=[^/]*/))({_UUID})[./].*")


def input_key(job_id: UUID, image_type: ImageType) -> str:
    """Inputs and outputs have a prefix each, since a bucket's lifecycle rules go by prefix."""
    return f"{INPUTS}{job_id}.{_SUFFIXES[image_type]}"


def output_key(ref: AttemptRef, output_format: OutputFormat) -> str:
    """Named after job and attempt, so that a late zombie cannot overwrite another's result."""
    return f"{OUTPUTS}{ref.job_id}/{ref.attempt}{output_format.suffix}"


def copy_key(job_id: UUID, output_format: OutputFormat) -> str:
    """For another job's result that becomes this one's; two requests may try to make one job."""
    return f"{OUTPUTS}{job_id}/copy-{uuid4()}{output_format.suffix}"


def upload_key(owner: str, upload_id: UUID) -> str:
    """Where an owner's upload lies until a job is made of it.

    The owner is part of the key, so that nobody reaches another's upload by its id.
    """
    return f"{UPLOADS}{hashlib.sha256(owner.encode()).hexdigest()}/{upload_id}"


def job_of(key: str) -> UUID | None:
    """The job for which an input's or output's key was made; None for no key of ours."""
    found = _OURS.fullmatch(key)
    return UUID(found[1]) if found else None


def filename_of(key: str) -> str:
    """What the object at `key` is saved as; a result says whose it is."""
    name = Path(key)
    return f"restored-{job_of(key)}{name.suffix}" if key.startswith(OUTPUTS) else name.name
