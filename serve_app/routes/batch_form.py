"""The multipart form of a batch, read as a stream: one photo after another, never all of them.

The fields come first, because what they ask for decides about each photo that follows; and a
batch that is wrong as a whole is refused before its photos have been sent.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request
from pydantic import Field
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from actors.batch_submission import Photo
from restoration.batches import MAX_BATCH_ITEMS
from restoration.jobs import Priority
from restoration.reuse import Reuse
from serve_app.openapi import multipart_form
from serve_app.routes.forms import (
    FORM_OVERHEAD_BYTES,
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    JobForm,
    ReuseField,
    WorkflowForm,
    malformed,
    validated,
)

# Each photo's boundary and headers, on top of the photos themselves.
BATCH_OVERHEAD_BYTES = FORM_OVERHEAD_BYTES + MAX_BATCH_ITEMS * 1024
_PHOTO_FIELD = "image"


class BatchForm(WorkflowForm):
    """Every field of the form but the photos; they hold for each of these."""

    priority: Priority = Field(
        Priority.BATCH,
        description="interactive goes before batch, until a batch job has waited for long",
    )
    reuse: ReuseField = Field(Reuse.ALLOW, description=JobForm.model_fields["reuse"].description)


BATCH_BODY = multipart_form(
    {_PHOTO_FIELD: "JPEG, PNG, WebP, TIFF or BMP; after all other fields"},
    BatchForm.model_json_schema(ref_template="#/components/schemas/{model}"),
    max_files=MAX_BATCH_ITEMS,
)


@dataclass(slots=True)
class _Part:
    """What has arrived of a part. `data` stops one byte behind `limit_bytes`, which tells."""

    name: str
    filename: str | None
    limit_bytes: int
    data: bytearray = field(default_factory=bytearray)
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    def take(self, data: bytes) -> None:
        self.data += data[: self.limit_bytes + 1 - len(self.data)]
        self.hash.update(data)

    def photo(self) -> Photo:
        return Photo(self.filename or "", bytes(self.data), self.hash.hexdigest())


class BatchFormReader:
    """Reads one request's form: `fields` first, and then `photos`, each once.

    Both raise RequestValidationError (malformed), 400 for no multipart, and what the body's limit
    raises.
    """

    def __init__(self, request: Request, max_image_bytes: int) -> None:
        """Raises HTTPException for another type of content."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind.lower() != b"multipart/form-data":
            raise HTTPException(415, "send multipart/form-data with photos in the field 'image'")
        if not (boundary := options.get(b"boundary")):
            raise HTTPException(400, "the multipart form names no boundary")
        self._chunks = request.stream()
        with _malformed_is_400():
            self._splitter = _Splitter(boundary, max_image_bytes)
        self._ended = False

    async def fields(self) -> BatchForm:
        """The fields in front of the first photo."""
        texts: dict[str, str] = {}
        while (part := await self._next()) is not None:
            if part.filename is not None:
                self._splitter.put_back(part)
                break
            if part.name in texts or part.name == _PHOTO_FIELD or len(texts) == MAX_FIELDS:
                raise malformed(part.name, "each field must be sent once, and photos as files")
            texts[part.name] = _text(part)
        return validated(BatchForm, texts)

    async def photos(self) -> AsyncGenerator[Photo, None]:
        while (part := await self._next()) is not None:
            if part.filename is None:
                raise malformed(part.name, "send every other field before the photos")
            if part.name != _PHOTO_FIELD:
                raise malformed(part.name, "send files in the field 'image' only")
            yield part.photo()

    async def _next(self) -> _Part | None:
        while (part := self._splitter.next()) is None and not self._ended:
            chunk = await anext(self._chunks, b"")  # an empty one is the last
            self._ended = not chunk
            with _malformed_is_400():
                self._splitter.feed(chunk)
        return part


@contextmanager
def _malformed_is_400() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise HTTPException(400, "the body is not a well-formed multipart form") from error


class _Splitter:
    """Cuts a multipart body, fed in pieces, into its parts. No I/O."""

    def __init__(self, boundary: bytes, max_image_bytes: int) -> None:
        self._max_image_bytes = max_image_bytes
        self._whole: deque[_Part] = deque()
        self._part: _Part | None = None
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin,
                "on_part_data": self._take,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """No bytes say that the body has ended. Raises FormParserError."""
        if chunk:
            self._parser.write(chunk)
        elif not self._ended:
            raise FormParserError("the body ends before its last part does")

    def next(self) -> _Part | None:
        """The next part that has arrived as a whole."""
        return self._whole.popleft() if self._whole else None

    def put_back(self, part: _Part) -> None:
        self._whole.appendleft(part)

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _begin(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        filename = options.get(b"filename")
        self._part = _Part(
            name=_decoded(options.get(b"name", b"")),
            filename=None if filename is None else _decoded(filename),
            limit_bytes=MAX_FIELD_BYTES if filename is None else self._max_image_bytes,
        )

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._part is not None:
            self._part.take(data[start:end])

    def _end(self) -> None:
        if self._part is not None:
            self._whole.append(self._part)
        self._part = None

    def _finish(self) -> None:
        self._ended = True


def _text(part: _Part) -> str:
    if len(part.data) > part.limit_bytes:
        raise malformed(part.name, f"a field may have {part.limit_bytes} bytes")
    return _decoded(part.data)


def _decoded(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "replace")
