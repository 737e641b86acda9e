"""Read multipart forms (RFC 7578) part by part, with one part in memory at a time.

The variants of part headers that browsers, curl and HTTP libraries write are understood.
"""

from __future__ import annotations

import hashlib
import re
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from io import BytesIO

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.exceptions import HTTPException

PHOTO = "image"  # the form field of the photo, or of each photo
MAX_FIELD_BYTES = 64 * 1024
_MAX_PART_HEADER_BYTES = 16 * 1024  # a path of 4096 bytes, each of them percent-encoded
# Accepted encodings of a field. Python's others include slow and broken ones.
_CHARSETS = {
    "utf-8": "utf-8-sig",
    "utf8": "utf-8-sig",
    "us-ascii": "utf-8-sig",
    "ascii": "utf-8-sig",
    "iso-8859-1": "cp1252",  # as browsers read it
    "latin1": "cp1252",
    "windows-1252": "cp1252",
}
# Values of Content-Transfer-Encoding that change nothing.
_PLAIN = frozenset({"7bit", "8bit", "binary"})
# Escapes that browsers, curl and HTTP libraries write for characters not allowed in a quoted name.
_ESCAPED = re.compile("%(22|0D|0A)", re.IGNORECASE)


def malformed(field: str, message: str) -> RequestValidationError:
    """Return the error for an invalid form field, which becomes a 422 response."""
    return RequestValidationError([{"loc": ("form", field), "msg": message, "type": "form"}])


@dataclass(slots=True)
class Part:
    """A part that has arrived.

    At most `limit_bytes` plus one byte of its data is kept; `hash` covers all of it.
    """

    name: str
    filename: str | None
    content_type: Message
    encoding: str
    limit_bytes: int
    _data: BytesIO = field(default_factory=BytesIO)  # returns its bytes without a copy
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def is_file(self) -> bool:
        """Return whether the part is a file. Without a file name, its type marks it as one."""
        if self.filename is not None:
            return True
        kind = self.content_type.get_content_type()
        return kind.startswith("image/") or kind == "application/octet-stream"

    @property
    def is_blank(self) -> bool:
        """Return whether the part stands for a browser's file input without a chosen file."""
        return not self.filename and not self._data.tell()

    def take(self, data: bytes) -> None:
        """Append a chunk of the part's data."""
        self._data.write(data[: self.limit_bytes + 1 - self._data.tell()])
        self.hash.update(data)

    def data(self) -> bytes:
        """Return the data kept: all of it, or one byte more than the limit."""
        return self._data.getvalue()

    def text(self) -> str:
        """Return the field's value, stripped of white space.

        Raises RequestValidationError if it is too long or wrongly encoded.
        """
        data = self.data()
        if len(data) > self.limit_bytes:
            raise malformed(self.name, f"the field is longer than {self.limit_bytes} bytes")
        charset = self.content_type.get_content_charset("utf-8")
        # a byte order mark is more reliable than the charset, which some tools set by default
        codec = "utf-8-sig" if data.startswith(BOM_UTF8) else _CHARSETS.get(charset)
        if codec is None:
            raise malformed(self.name, f"the field must be in UTF-8, not {charset}")
        try:
            return data.decode(codec).strip()
        except UnicodeDecodeError:
            raise malformed(self.name, "the field must be UTF-8 text") from None


class FormParts:
    """Reads the parts of one request's form, in order.

    `names` are the allowed fields; each may be sent once, except for the photo's.
    """

    def __init__(self, request: Request, names: Collection[str], max_photo_bytes: int) -> None:
        """Raise HTTPException: 415 for another content type, 400 for a missing boundary."""
        content_type = header_of(request.headers.get("content-type", "text/plain"))
        if (kind := content_type.get_content_type()) != "multipart/form-data":
            raise HTTPException(
                415,
                f"the Content-Type must be multipart/form-data, not {kind}; send photos in "
                f"the field {PHOTO!r}",
            )
        if _CHARSETS.get(content_type.get_content_charset("utf-8")) != _CHARSETS["utf-8"]:
            raise HTTPException(415, "the form must be in UTF-8")
        if not (boundary := _text_of(_parameters(content_type).get("boundary", ""))):
            raise HTTPException(
                400,
                "the Content-Type multipart/form-data lacks a boundary; let your HTTP "
                "library set this header",
            )
        self._chunks = request.stream()
        self._names = names
        self._seen: set[str] = set()
        with _malformed_is_400():
            self._splitter = _Splitter(boundary.encode(), max_photo_bytes)
        self._ended = False

    async def next(self) -> Part | None:
        """Return the next part, or None at the end.

        Raises RequestValidationError for an unknown or repeated field, HTTPException 400 for an
        invalid body, and the errors of the body's limits.
        """
        while (part := self._splitter.next()) is None and not self._ended:
            chunk = await anext(self._chunks, b"")  # an empty chunk marks the end
            self._ended = not chunk
            with _malformed_is_400():
                self._splitter.feed(chunk)
        if part is None:
            return None
        if not part.name:
            raise malformed("form", "each part of the form must have a field name")
        if part.name not in self._names:
            having = ", ".join(sorted(self._names))
            raise malformed(part.name, f"the form has no such field; its fields are {having}")
        if part.encoding not in _PLAIN:
            raise malformed(
                part.name, f"the Content-Transfer-Encoding must be binary, not {part.encoding}"
            )
        if part.name in self._seen and part.name != PHOTO:
            raise malformed(part.name, "the field was sent more than once")
        self._seen.add(part.name)
        return part


def header_of(value: str) -> Message:
    """Return a Content-Type or Content-Disposition (as latin-1) with access to its parameters."""
    message = Message()
    message["Content-Type"] = value.replace("\r", " ").replace("\n", " ")
    return message


@contextmanager
def _malformed_is_400() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise HTTPException(400, "the body is not valid multipart/form-data") from error


class _Splitter:
    """Splits a multipart body, fed in chunks, into its parts. No I/O."""

    def __init__(self, boundary: bytes, max_photo_bytes: int) -> None:
        self._max_photo_bytes = max_photo_bytes
        self._whole: deque[Part] = deque()
        self._part: Part | None = None
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._headers: dict[str, str] = {}
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
            max_header_size=_MAX_PART_HEADER_BYTES,
        )

    def feed(self, chunk: bytes) -> None:
        """Parse a chunk. An empty one marks the end of the body. Raises FormParserError."""
        if chunk:
            self._parser.write(chunk)
        elif not self._ended:
            raise FormParserError("the body ends before its last part")

    def next(self) -> Part | None:
        """Return the next complete part, or None."""
        return self._whole.popleft() if self._whole else None

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        self._header = (bytearray(), bytearray())

    def _begin(self) -> None:
        parameters = _parameters(header_of(self._headers.get("content-disposition", "form-data")))
        name, filename = _text_of(parameters.get("name", "")), parameters.get("filename")
        self._part = Part(
            name=name,
            filename=None if filename is None else _text_of(filename),
            content_type=header_of(self._headers.get("content-type", "text/plain")),
            encoding=self._headers.get("content-transfer-encoding", "binary").strip().lower(),
            limit_bytes=self._max_photo_bytes if name == PHOTO else MAX_FIELD_BYTES,
        )
        self._headers = {}

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._part is not None:
            self._part.take(data[start:end])

    def _end(self) -> None:
        if self._part is not None:
            self._whole.append(self._part)
        self._part = None

    def _finish(self) -> None:
        self._ended = True


_Parameter = str | tuple[str | None, str | None, str]


def _parameters(header: Message) -> dict[str, _Parameter]:
    """Return the header's parameters by name.

    `filename*`, which states its encoding, takes precedence over `filename`.
    """
    return dict(header.get_params(failobj=[]))


def _text_of(parameter: _Parameter) -> str:
    """Return a parameter's text: plain UTF-8, or the extended notation of RFC 2231 and 5987."""
    if isinstance(parameter, tuple):
        charset, _, text = parameter
        codec = _CHARSETS.get((charset or "utf-8").lower(), "utf-8")
        return text.encode("latin-1", "replace").decode(codec, "replace")
    text = parameter.encode("latin-1").decode("utf-8", "replace")
    return _ESCAPED.sub(lambda escape: chr(int(escape[1], 16)), text)
