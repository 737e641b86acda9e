"""A job's result as an answer: a part of it after another, read from S3 as the client takes them.

None is held for a client that does not read. The sha256 of the whole is known only with its last
part, so that part is sent only if it is right: a damaged result ends before its Content-Length
does, and no client takes it for complete. A result of one part is checked before it is begun with.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from restoration.errors import ArtifactCorrupt
from restoration.jobs import Artifact, Job
from restoration.ports import BlobStore
from serve_app.asgi.head_requests import is_head_only

PART_BYTES = 1024 * 1024
_RANGE = re.compile(r"bytes=[ \t]*(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))[ \t]*", re.I)


async def picture(
    request: Request, blobs: BlobStore, job: Job, headers: Mapping[str, str]
) -> Response:
    """The job's result, or the part that a GET asks for.

    Raises ResultNotReady and its kin, ArtifactCorrupt, DependencyUnavailable.
    """
    output = job.result()
    about = {
        "Content-Disposition": f'attachment; filename="{filename_of(job)}"',
        "Cache-Control": "private",
        "ETag": _etag(output),
        "Accept-Ranges": "bytes",
        # RFC 9530: of the whole, by which a client checks what it has put together
        "Repr-Digest": f"sha-256=:{b64encode(bytes.fromhex(output.sha256)).decode()}:",
        **headers,
    }
    asked = asked_range(request.headers, output) if request.method == "GET" else None
    status, first_byte, end = 200, 0, output.size_bytes
    if asked is not None:
        status, first_byte, end = 206, asked.start, asked.stop
        about["Content-Range"] = f"bytes {asked.start}-{asked.stop - 1}/{output.size_bytes}"
    about["Content-Length"] = str(end - first_byte)
    if is_head_only(request):
        return Response(status_code=status, media_type=output.content_type, headers=about)
    parts = _parts(blobs, output, first_byte, end)
    # what is gone is an error, and not a picture that breaks off
    first = await anext(parts)
    return StreamingResponse(_resumed(first, parts), status, about, output.content_type)


def filename_of(job: Job) -> str:
    """What a browser saves the result as."""
    return f"restored-{job.id}{job.output_format.suffix}"


def asked_range(headers: Headers, output: Artifact) -> range | None:
    """The bytes that `Range` asks for; None for all of them.

    As RFC 9110 allows, several ranges, and what cannot be read, are answered with the whole, as is
    a range of another version (`If-Range`). Raises 416 for one that begins behind the end.
    """
    asked = headers.getlist("range")
    found = _RANGE.fullmatch(asked[0]) if len(asked) == 1 else None
    if found is None or headers.get("if-range", _etag(output)) != _etag(output):
        return None
    size = output.size_bytes
    first, last, suffix = found.groups()
    if suffix is not None:
        start, stop = max(size - int(suffix), 0), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= stop:
        raise HTTPException(
            416,
            f"the result has {size} bytes, and none in this range",
            {"Content-Range": f"bytes */{size}"},
        )
    return range(start, stop)


def _etag(output: Artifact) -> str:
    return f'"{output.sha256}"'


async def _parts(blobs: BlobStore, output: Artifact, start: int, end: int) -> AsyncIterator[bytes]:
    """Raises ArtifactCorrupt before the last part if all of them are another object's."""
    if output.size_bytes <= PART_BYTES:
        yield (await blobs.get(output))[start:end]
        return
    is_whole, digest = end - start == output.size_bytes, hashlib.sha256()
    while start < end:
        stop = min(start + PART_BYTES, end)
        part = await blobs.read(output, start, stop)
        digest.update(part)
        if is_whole and stop == end and digest.hexdigest() != output.sha256:
            raise ArtifactCorrupt(
                f"the object {output.key} is not what was stored: its sha256 is another",
                key=output.key,
            )
        yield part
        start = stop


async def _resumed(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part
