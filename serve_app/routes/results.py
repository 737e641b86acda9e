"""Send a job's result in parts, read from S3 as fast as the client takes them.

Nothing is held for a client that does not read. The sha256 of a whole result is known only with its
last part, so that part is sent only if the hash matches: a damaged result ends before its
Content-Length, and no client takes it for complete. A result of a single part is checked before the
response starts.
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
from restoration.ports.objects import BlobStore
from serve_app.asgi.head_requests import is_head_only

PART_BYTES = 1024 * 1024
_RANGE = re.compile(r"bytes=[ \t]*(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))[ \t]*", re.I)


async def picture(
    request: Request, blobs: BlobStore, job: Job, headers: Mapping[str, str]
) -> Response:
    """Return a response with the job's result, or with the range that a GET asks for.

    Raises ResultNotReady, ResultExpired, ArtifactCorrupt and DependencyUnavailable.
    """
    output = job.result()
    about = {
        "Content-Disposition": f'attachment; filename="{filename_of(job)}"',
        "Cache-Control": "private",
        "ETag": _etag(output),
        "Accept-Ranges": "bytes",
        # RFC 9530: of the whole result, so that a client can check what it has put together
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
    # a missing object becomes an error response instead of a truncated picture
    first = await anext(parts)

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for part in parts:
            yield part

    return StreamingResponse(body(), status, about, output.content_type)


def filename_of(job: Job) -> str:
    """Return the file name under which a browser saves the result."""
    return f"restored-{job.id}{job.output_format.suffix}"


def asked_range(headers: Headers, output: Artifact) -> range | None:
    """Return the range of bytes that `Range` asks for, or None for all of them.

    As RFC 9110 allows, the whole result is sent for several ranges, for a malformed one, and for a
    range of another version (`If-Range`). Raises HTTPException 416 for a range behind the end.
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
            f"the range is outside of the result, which has {size} bytes",
            {"Content-Range": f"bytes */{size}"},
        )
    return range(start, stop)


def _etag(output: Artifact) -> str:
    return f'"{output.sha256}"'


async def _parts(blobs: BlobStore, output: Artifact, start: int, end: int) -> AsyncIterator[bytes]:
    """Yield the bytes from `start` to `end` in parts.

    Raises ArtifactCorrupt before the last part if the whole is sent and its hash differs.
    """
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
                f"the object {output.key} differs from what was stored: its sha256 differs",
                key=output.key,
            )
        yield part
        start = stop
