"""Opaque cursors for the pages of a listing. No I/O."""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from restoration.errors import InvalidRequest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Version, microseconds since the epoch, id, then a CRC of these: 30 bytes, or 40 characters of
# URL-safe base64 without padding.
_LAYOUT = struct.Struct(">Hq16s")
_CHECKSUM = struct.Struct(">I")
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of the last item of a page; the next page starts after it."""

    created_at: datetime
    id: UUID

    def encode(self) -> str:
        moment_us = (self.created_at - _EPOCH) // _MICROSECOND
        body = _LAYOUT.pack(_VERSION, moment_us, self.id.bytes)
        return base64.urlsafe_b64encode(body + _CHECKSUM.pack(binascii.crc32(body))).decode()

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Decode a cursor. Raises InvalidRequest if `encode` did not make it."""
        try:
            raw = base64.b64decode(text, altchars=b"-_", validate=True)
            body, checksum = raw[: _LAYOUT.size], raw[_LAYOUT.size :]
            version, moment_us, id_bytes = _LAYOUT.unpack(body)
            intact = checksum == _CHECKSUM.pack(binascii.crc32(body)) and version == _VERSION
            cursor = cls(_EPOCH + timedelta(microseconds=moment_us), UUID(bytes=id_bytes))
        except (ValueError, struct.error, OverflowError):
            intact = False
        if not intact:
            raise InvalidRequest("the cursor is invalid; follow the `next` path of a page")
        return cursor
