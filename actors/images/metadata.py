"""Reads and filters the EXIF of uploads, and removes metadata from PNGs.

A result contains no metadata of the engine (ComfyUI writes the whole graph, with paths and prompts)
and none of the upload (place, time, camera, owner), unless its job asks for the upload's EXIF.
Values are copied as bytes, because the encoding of texts is not recorded.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from PIL.ExifTags import IFD, Base

from actors.images.png import SIGNATURE, chunks, exif_chunk

# Chunks that define the pixels and their colours (PNG, third edition, 11.3). The rest is dropped.
_PIXEL_CHUNKS = frozenset(
    (b"IHDR", b"PLTE", b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"IDAT", b"IEND")
)

_MAX_EXIF_BYTES = 65_000  # a JPEG holds 65,533
_MAX_ENTRIES = 2_000  # in a directory; cameras write a few hundred at most
_PREFIX = b"Exif\0\0"
_KEPT = {
    Base.ImageDescription,
    Base.Make,
    Base.Model,
    Base.Software,
    Base.DateTime,
    Base.Artist,
    Base.HostComputer,
    Base.Copyright,
    Base.XPTitle,
    Base.XPComment,
    Base.XPAuthor,
    Base.XPKeywords,
    Base.XPSubject,
}
# These describe the upload's pixels, not the result's.
_OUTDATED = {
    Base.ExifImageWidth,
    Base.ExifImageHeight,
    Base.ColorSpace,
    Base.ExifInteroperabilityOffset,
}
_SHORT, _LONG = 3, 4
# Size in bytes of each type (TIFF 6.0, section 2; 13 is IFD).
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BIG_SIZES = {**_SIZES, 16: 8, 17: 8, 18: 8}


@dataclass(frozen=True, slots=True)
class _Entry:
    tag: int
    type: int
    count: int
    value: bytes


@dataclass(frozen=True, slots=True)
class _Structure:
    """A TIFF structure. `order`: byte order as in `struct`; `big`: whether it is a BigTIFF."""

    data: bytes
    order: str
    big: bool

    @classmethod
    def of(cls, data: bytes) -> _Structure | None:
        data = data.removeprefix(_PREFIX)
        order = {b"II": "<", b"MM": ">"}.get(data[:2])
        if order is None or len(data) < 8:
            return None
        (version,) = struct.unpack_from(f"{order}H", data, 2)
        return cls(data, order, big=version == 43) if version in {42, 43} else None

    def first(self) -> int:
        return self._number(8 if self.big else 4, 8 if self.big else 4)

    def entries(self, start: int) -> Iterator[_Entry]:
        """Yield the readable entries of the directory at `start`."""
        head, size, width = (8, 20, 8) if self.big else (2, 12, 4)
        sizes = _BIG_SIZES if self.big else _SIZES
        for n in range(min(self._number(start, head), _MAX_ENTRIES)):
            place = start + head + n * size
            if place + size > len(self.data):
                return
            tag, kind = struct.unpack_from(f"{self.order}HH", self.data, place)
            count = self._number(place + 4, width)
            if kind not in sizes:
                continue
            length = count * sizes[kind]
            at = place + 4 + width
            if length > width:
                at = self._number(at, width)
            if at + length <= len(self.data):
                yield _Entry(tag, kind, count, self.data[at : at + length])

    def pointer(self, entry: _Entry) -> int:
        return self._decoded(entry.value)

    def _number(self, place: int, size: int) -> int:
        if place + size > len(self.data):
            return 0
        return self._decoded(self.data[place : place + size])

    def _decoded(self, value: bytes) -> int:
        return int.from_bytes(value, "little" if self.order == "<" else "big")


def orientation_of(exif: bytes | None) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or unreadable."""
    structure = _Structure.of(exif) if exif else None
    if structure is None:
        return 1
    for entry in structure.entries(structure.first()):
        if entry.tag == Base.Orientation and entry.type in {_SHORT, _LONG} and entry.count == 1:
            return orientation_of_tag(structure.pointer(entry))
    return 1


def orientation_of_tag(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def kept_exif(exif: bytes | None) -> bytes | None:
    """Return the EXIF for the result, with JPEG's `Exif` prefix, or None if nothing remains.

    It keeps camera, times, place and author, and drops the orientation (a result is upright), the
    thumbnail, and tags about the uploaded file. The byte order is the upload's. The maker note is
    dropped if it would exceed 65,000 bytes with it.
    """
    structure = _Structure.of(exif) if exif else None
    if structure is None:
        return None
    pointers, kept = dict[int, int](), dict[int, _Entry]()
    for entry in structure.entries(structure.first()):
        if entry.tag in {IFD.Exif, IFD.GPSInfo}:
            pointers.setdefault(entry.tag, structure.pointer(entry))
        elif entry.tag in _KEPT and len(entry.value) < _MAX_EXIF_BYTES:
            kept.setdefault(entry.tag, entry)
    below = {tag: _sub_entries(structure, place) for tag, place in pointers.items()}
    without_note = {
        pointer: {tag: entry for tag, entry in entries.items() if tag != Base.MakerNote}
        for pointer, entries in below.items()
    }
    for attempt in (below, without_note):
        if not kept and not any(attempt.values()):
            return None
        data = _written(structure, kept, attempt)
        if len(data) <= _MAX_EXIF_BYTES:
            return data
    return None


def _sub_entries(structure: _Structure, start: int) -> dict[int, _Entry]:
    found, size = dict[int, _Entry](), 0
    for entry in structure.entries(start):
        if (
            entry.tag not in _OUTDATED
            and entry.type in _SIZES
            and len(entry.value) < _MAX_EXIF_BYTES
        ):
            size += len(entry.value)
            if size > 4 * _MAX_EXIF_BYTES:
                return found
            found.setdefault(entry.tag, entry)
    return found


def _written(
    structure: _Structure, main: dict[int, _Entry], below: dict[int, dict[int, _Entry]]
) -> bytes:
    """Return a classic TIFF structure: the main directory, followed by its sub-directories."""
    order = structure.order
    magic = b"II*\0" if order == "<" else b"MM\0*"
    start = 8
    pointers = {tag: entries for tag, entries in below.items() if entries}
    size = _directory_bytes(main.values(), len(pointers))
    entries, parts = dict(main), []
    place = start + size
    for tag, sub in sorted(pointers.items()):
        entries[tag] = _Entry(tag, _LONG, 1, struct.pack(f"{order}I", place))
        parts.append(_directory(order, sub.values(), place))
        place += len(parts[-1])
    head = magic + struct.pack(f"{order}I", start)
    return _PREFIX + head + _directory(order, entries.values(), start) + b"".join(parts)


def _directory_bytes(entries: Collection[_Entry], more: int) -> int:
    """Return the size of a directory with these entries and `more` pointers."""
    values = sum(len(e.value) + len(e.value) % 2 for e in entries if len(e.value) > 4)
    return 2 + 12 * (len(entries) + more) + 4 + values


def _directory(order: str, entries: Collection[_Entry], start: int) -> bytes:
    listed = sorted(entries, key=lambda entry: entry.tag)
    table, beyond = struct.pack(f"{order}H", len(listed)), b""
    values = start + 2 + 12 * len(listed) + 4
    for entry in listed:
        table += struct.pack(f"{order}HHI", entry.tag, entry.type, entry.count)
        if len(entry.value) <= 4:
            table += entry.value.ljust(4, b"\0")
        else:
            table += struct.pack(f"{order}I", values + len(beyond))
            beyond += entry.value + bytes(len(entry.value) % 2)
    return table + bytes(4) + beyond


def bare_png(png: bytes, exif: bytes | None = None) -> bytes:
    """Return the PNG with the same compressed pixels, and `exif` as its only metadata.

    Raises EngineFailed for data that is not a complete PNG.
    """
    kept = [whole for name, whole in chunks(png) if name in _PIXEL_CHUNKS]
    if exif is None and len(SIGNATURE) + sum(map(len, kept)) == len(png):
        return png
    extra = [] if exif is None else [exif_chunk(exif)]
    return b"".join([SIGNATURE, kept[0], *extra, *kept[1:]])
