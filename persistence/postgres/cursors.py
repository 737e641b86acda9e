"""Where a page of a listing ended, as an opaque text for the client to hand back. Pure."""

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
# Version, microseconds since the epoch, id; a CRC of these follows. Together 30 bytes, which make
# 40 characters of base64 without padding, fit for a URL as they are.
_LAYOUT = struct.Struct(">Hq16s")
_CHECKSUM = struct.Struct(">I")
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last job of a page; a listing goes on behind it."""

    created_at: datetime
    id: UUID

    def encode(self) -> str:
        moment_us = (self.created_at - _EPOCH) // _MICROSECOND
        body = _LAYOUT.pack(_VERSION, moment_us, self.id.bytes)
        return base64.urlsafe_b64encode(body + _CHECKSUM.pack(binascii.crc32(body))).decode()

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Raises InvalidRequest for anything that `encode` did not make."""
        try:
            raw = base64.b64decode(text, altchars=b"-_", validate=True)
            body, checksum = raw[: _LAYOUT.size], raw[_LAYOUT.size :]
            version, moment_us, id_bytes = _LAYOUT.unpack(body)
            intact = checksum == _CHECKSUM.pack(binascii.crc32(body)) and version == _VERSION
            cursor = cls(_EPOCH + timedelta(microseconds=moment_us), UUID(bytes=id_bytes))
        except (ValueError, struct.error, OverflowError):
            intact = False
        if not intact:
            raise InvalidRequest("the cursor is not one that this service gave out")
        return cursor
