"""Keys of the objects in S3: the only module that makes and parses them."""

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
    """Return the key of a job's input.

    Inputs and outputs have different prefixes, because lifecycle rules of a bucket go by prefix.
    """
    return f"{INPUTS}{job_id}.{_SUFFIXES[image_type]}"


def output_key(ref: AttemptRef, output_format: OutputFormat) -> str:
    """Return the key of an attempt's result, so that no attempt can overwrite another's."""
    return f"{OUTPUTS}{ref.job_id}/{ref.attempt}{output_format.suffix}"


def copy_key(job_id: UUID, output_format: OutputFormat) -> str:
    """Return a new key for a copy of another job's result.

    It is unique, because two requests may try to make the same job.
    """
    return f"{OUTPUTS}{job_id}/copy-{uuid4()}{output_format.suffix}"


def upload_key(owner: str, upload_id: UUID) -> str:
    """Return the key of an owner's direct upload.

    The owner is part of the key, so that the id alone does not give access to another's upload.
    """
    return f"{UPLOADS}{hashlib.sha256(owner.encode()).hexdigest()}/{upload_id}"


def job_of(key: str) -> UUID | None:
    """Return the job of an input's or output's key, or None for any other key."""
    found = _OURS.fullmatch(key)
    return UUID(found[1]) if found else None


def filename_of(key: str) -> str:
    """Return the file name under which clients save the object; a result's has its job's id."""
    name = Path(key)
    return f"restored-{job_of(key)}{name.suffix}" if key.startswith(OUTPUTS) else name.name
