"""The batch calls of the Python client.

Files are read while they are sent, one at a time, so a batch may exceed the memory and the limit on
open files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
from pydantic import ValidationError

from restoration.jobs import OutputFormat, Priority
from restoration.reuse import Reuse
from serve_app.client.connection import Connection
from serve_app.client.errors import ApiError, parse
from serve_app.schemas.batches import (
    BatchItems,
    BatchItemView,
    BatchList,
    BatchProgress,
    BatchView,
    SubmittedBatchView,
)
from serve_app.sse import Decoder

BATCHES = "/api/v1/batches"
POLL_S = 1.0
_CHUNK_BYTES = 64 * 1024
# After the last byte is sent, the service may still be checking the last photos.
_ANSWER_TIMEOUT = httpx.Timeout(120.0, connect=5.0)


class BatchCalls(Connection):
    def submit_batch(
        self,
        photos: Sequence[Path],
        *,
        names: Sequence[str] | None = None,
        workflow: str = "restore",
        params: Mapping[str, object] | None = None,
        output_format: OutputFormat | None = None,
        priority: Priority = Priority.BATCH,
        idempotency_key: str | None = None,
        reuse: Reuse = Reuse.ALLOW,
    ) -> SubmittedBatchView:
        """Submit up to 1,000 photos as one batch; on return, the accepted ones are stored.

        `items` of the result lists the photos in the order given, each with its job or its refusal.
        `names` replaces the files' own names. Raises OSError for a file that cannot be read, and
        then nothing was submitted; raises ApiError.
        """
        form = _Form(
            {
                "workflow": workflow,
                "params": json.dumps(params or {}),
                "priority": priority.value,
                **({"output_format": output_format.value} if output_format else {}),
                **({"reuse": reuse.value} if reuse is not Reuse.ALLOW else {}),
            },
            list(zip(names or [photo.name for photo in photos], photos, strict=True)),
        )
        answer = self._call(
            "POST",
            BATCHES,
            content=form,
            headers={**form.headers, "Idempotency-Key": idempotency_key or str(uuid4())},
            timeout=_ANSWER_TIMEOUT,
        )
        return parse(SubmittedBatchView, answer)

    def batch(self, batch_id: UUID | str) -> BatchView:
        """Return the batch as it is now. Raises ApiError."""
        return parse(BatchView, self._call("GET", f"{BATCHES}/{batch_id}"))

    def batches(self, limit: int = 20) -> Iterator[BatchView]:
        """Yield all batches, newest first, fetching a page of `limit` at a time."""
        path: str | None = f"{BATCHES}?limit={limit}"
        while path is not None:
            page = parse(BatchList, self._call("GET", path))
            yield from page.batches
            path = page.next

    def batch_items(self, batch_id: UUID | str) -> Iterator[BatchItemView]:
        """Yield a batch's photos as they are now, in the order of submission."""
        path: str | None = f"{BATCHES}/{batch_id}/items"
        while path is not None:
            page = parse(BatchItems, self._call("GET", path))
            yield from page.items
            path = page.next

    def cancel_batch(self, batch_id: UUID | str) -> BatchView:
        """Ask for the batch's unfinished jobs to be cancelled, and return it. Some end later."""
        return parse(BatchView, self._call("POST", f"{BATCHES}/{batch_id}/cancel"))

    def batch_events(self, batch_id: UUID | str) -> Iterator[BatchProgress]:
        """Yield the batch's status and counts at each change; the last has a final status.

        When the stream is cut or unavailable, the batch is polled instead.
        """
        while True:
            # `batch` raises if the failure is not temporary
            with suppress(httpx.TransportError, ApiError):
                for data in self._stream(f"{BATCHES}/{batch_id}/events", Decoder()):
                    try:
                        progress = BatchProgress.model_validate_json(data)
                    except ValidationError:  # of a kind that this version does not know
                        continue
                    yield progress
                    if progress.status.is_final:
                        return
            batch = self.batch(batch_id)
            yield batch
            if batch.status.is_final:
                return
            # ends with the batch; `batch` raises if the service stays unreachable
            time.sleep(POLL_S)


class _Form:
    """A form of fields and photos that can be sent any number of times.

    A photo's name is written in the notation of RFC 5987, which keeps every character. httpx only
    writes quoted names, in which `%22` may stand for a quote or for itself. A file is open only
    while it is being sent.
    """

    def __init__(self, fields: Mapping[str, str], photos: Sequence[tuple[str, Path]]) -> None:
        """Raise OSError if a file does not exist."""
        self._boundary = uuid4().hex
        self._fields = b"".join(
            self._head(f'name="{name}"') + value.encode() + b"\r\n"
            for name, value in fields.items()
        )
        self._photos = [
            (
                self._head(
                    f"name=\"image\"; filename*=UTF-8''{quote(os.fsencode(name), safe='')}",
                    "Content-Type: application/octet-stream",
                ),
                path,
                path.stat().st_size,
            )
            for name, path in photos
        ]
        self._end = f"--{self._boundary}--\r\n".encode()

    @property
    def headers(self) -> dict[str, str]:
        photos = sum(len(head) + size_bytes + len(b"\r\n") for head, _, size_bytes in self._photos)
        return {
            "Content-Type": f"multipart/form-data; boundary={self._boundary}",
            "Content-Length": str(len(self._fields) + photos + len(self._end)),
        }

    def __iter__(self) -> Iterator[bytes]:
        yield self._fields
        for head, path, _ in self._photos:
            yield head
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
            yield b"\r\n"
        yield self._end

    def _head(self, disposition: str, *headers: str) -> bytes:
        first = f"--{self._boundary}\r\nContent-Disposition: form-data; {disposition}"
        return "\r\n".join([first, *headers, "", ""]).encode()
