"""Parses the boxes of HEIC and AVIF (ISO/IEC 23008-12) that describe the primary picture."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from restoration.errors import BrokenImage, UnsupportedImage

_MAX_BOXES = 20_000
_PICTURES = {b"hvc1", b"av01", b"grid", b"iden", b"iovl"}
_FULL = 4  # bytes of version and flags, with which a FullBox begins


@dataclass(slots=True)
class _Meta:
    primary: int = 0
    types: dict[int, bytes] = field(default_factory=dict)
    hidden: set[int] = field(default_factory=set)
    places: dict[int, tuple[int, list[tuple[int, int]]]] = field(default_factory=dict)
    references: list[tuple[bytes, int, list[int]]] = field(default_factory=list)
    alternatives: list[set[int]] = field(default_factory=list)
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)
    of_item: dict[int, list[int]] = field(default_factory=dict)
    idat: bytes = b""


@dataclass(frozen=True, slots=True)
class Primary:
    """The primary picture as described by the file's boxes.

    `nclx` has the primaries, transfer, matrix and the full range flag. `turns` is the number of
    counter-clockwise quarter turns, applied before `mirror`: 0 swaps top and bottom, 1 left and
    right.
    """

    width: int
    height: int
    bits: int
    nclx: tuple[int, int, int, bool] | None
    icc: bytes | None
    turns: int
    mirror: int | None
    is_cropped: bool
    exif: bytes | None


def primary(data: bytes) -> Primary:
    """Parse the primary picture's boxes.

    Raises BrokenImage, and UnsupportedImage for sequences and files of several pictures.
    """
    try:
        return _primary(data)
    except (struct.error, IndexError, KeyError) as error:
        raise BrokenImage("the image cannot be decoded: its box structure is invalid") from error


def _primary(data: bytes) -> Primary:
    top = {name: content for name, content in _boxes(data)}
    if b"moov" in top:
        raise UnsupportedImage("the file contains an image sequence; send a single image")
    meta = _meta(top[b"meta"][_FULL:])
    kind = meta.types[meta.primary]
    if kind not in _PICTURES:
        raise UnsupportedImage(
            f"HEIF images of the type {kind.decode('latin-1')} are not supported"
        )
    if _others(meta):
        raise UnsupportedImage(
            "the file contains more than one image; send each image in its own file"
        )
    mine = [meta.properties[n - 1] for n in meta.of_item.get(meta.primary, ()) if n]
    found = {name: content for name, content in reversed(mine) if name != b"colr"}
    if b"ispe" not in found:
        raise BrokenImage("the image cannot be decoded: its size is missing")
    width, height = struct.unpack_from(">II", found[b"ispe"], _FULL)
    nclx, icc = _colours(content for name, content in mine if name == b"colr")
    return Primary(
        width=width,
        height=height,
        bits=_bits(meta, found),
        nclx=nclx,
        icc=icc,
        turns=found[b"irot"][0] & 3 if b"irot" in found else 0,
        mirror=found[b"imir"][0] & 1 if b"imir" in found else None,
        is_cropped=b"clap" in found,
        exif=_exif(meta, data),
    )


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    for _ in range(_MAX_BOXES):
        if place + 8 > len(data):
            return
        size, name = struct.unpack_from(">I4s", data, place)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, place + 8)
            head = 16
        elif size == 0:
            size = len(data) - place
        if size < head or place + size > len(data):
            # A truncated last box is accepted: it holds data, which the decoder checks.
            yield name, data[place + head :]
            return
        yield name, data[place + head : place + size]
        place += size
    raise BrokenImage("the image cannot be decoded: it has too many boxes")


def _meta(content: bytes) -> _Meta:
    meta = _Meta()
    for name, box in _boxes(content):
        match name:
            case b"pitm":
                meta.primary = int.from_bytes(box[_FULL : _FULL + (4 if box[0] else 2)])
            case b"iinf":
                _read_infos(meta, box)
            case b"iloc":
                _read_places(meta, box)
            case b"iref":
                _read_references(meta, box)
            case b"iprp":
                _read_properties(meta, box)
            case b"grpl":
                for kind, group in _boxes(box):
                    if kind == b"altr":
                        (count,) = struct.unpack_from(">I", group, _FULL + 4)
                        ids = group[_FULL + 8 : _FULL + 8 + 4 * count]
                        meta.alternatives.append({i for (i,) in struct.iter_unpack(">I", ids)})
            case b"idat":
                meta.idat = box
    return meta


def _read_infos(meta: _Meta, box: bytes) -> None:
    start = _FULL + (4 if box[0] else 2)
    for name, info in _boxes(box[start:]):
        if name == b"infe" and info[0] in {2, 3}:
            size = 2 if info[0] == 2 else 4
            item = int.from_bytes(info[_FULL : _FULL + size])
            meta.types[item] = info[_FULL + size + 2 : _FULL + size + 6]
            if info[3] & 1:
                meta.hidden.add(item)


def _read_places(meta: _Meta, box: bytes) -> None:
    version, sizes = box[0], box[_FULL : _FULL + 2]
    offset_size, length_size = sizes[0] >> 4, sizes[0] & 15
    base_size, index_size = sizes[1] >> 4, sizes[1] & 15 if version else 0
    place = _FULL + 2
    wide = 4 if version == 2 else 2

    def take(size: int) -> int:
        nonlocal place
        if place + size > len(box):
            raise IndexError
        place += size
        return int.from_bytes(box[place - size : place])

    for _ in range(take(wide)):
        item = take(wide)
        method = take(2) & 15 if version else 0
        take(2)
        base = take(base_size)
        extents = []
        for _ in range(take(2)):
            take(index_size)
            extents.append((base + take(offset_size), take(length_size)))
        meta.places[item] = (method, extents)


def _read_references(meta: _Meta, box: bytes) -> None:
    wide = 4 if box[0] else 2
    for name, reference in _boxes(box[_FULL:]):
        (count,) = struct.unpack_from(">H", reference, wide)
        ids = reference[wide + 2 : wide + 2 + wide * count]
        targets = [int.from_bytes(ids[n : n + wide]) for n in range(0, len(ids), wide)]
        meta.references.append((name, int.from_bytes(reference[:wide]), targets))


def _read_properties(meta: _Meta, box: bytes) -> None:
    for name, content in _boxes(box):
        if name == b"ipco":
            meta.properties = list(_boxes(content))
        elif name == b"ipma":
            (count,) = struct.unpack_from(">I", content, _FULL)
            place, wide = _FULL + 4, 4 if content[0] else 2
            for _ in range(count):
                item = int.from_bytes(content[place : place + wide])
                number = content[place + wide]
                place += wide + 1
                size = 2 if content[3] & 1 else 1
                last = 0x7FFF if size == 2 else 0x7F
                values = content[place : place + size * number]
                meta.of_item[item] = [
                    int.from_bytes(values[n : n + size]) & last for n in range(0, len(values), size)
                ]
                place += size * number


def _others(meta: _Meta) -> set[int]:
    """Return the other pictures, without thumbnails, tiles, alpha, depth and alternative forms."""
    parts = {item for kind, item, _ in meta.references if kind in {b"thmb", b"auxl"}}
    parts |= {to for kind, _, targets in meta.references if kind == b"dimg" for to in targets}
    for group in meta.alternatives:
        if meta.primary in group:
            parts |= group
    pictures = {item for item, kind in meta.types.items() if kind in _PICTURES}
    return pictures - parts - meta.hidden - {meta.primary}


def _bits(meta: _Meta, found: dict[bytes, bytes]) -> int:
    if len(pixi := found.get(b"pixi", b"")) > _FULL + 1:
        return pixi[_FULL + 1]
    for name, content in meta.properties:
        if name == b"av1C":
            return 12 if content[2] & 0x20 else 10 if content[2] & 0x40 else 8
    return 8


def _colours(boxes: Iterator[bytes]) -> tuple[tuple[int, int, int, bool] | None, bytes | None]:
    nclx, icc = None, None
    for box in boxes:
        if box[:4] == b"nclx":
            primaries, transfer, matrix, full = struct.unpack_from(">HHHB", box, 4)
            nclx = (primaries, transfer, matrix, bool(full & 0x80))
        elif box[:4] in {b"rICC", b"prof"}:
            icc = box[4:]
    return nclx, icc


def _exif(meta: _Meta, data: bytes) -> bytes | None:
    """Return the primary picture's EXIF, a TIFF structure that begins with II or MM."""
    for kind, item, targets in meta.references:
        if kind == b"cdsc" and meta.primary in targets and meta.types.get(item) == b"Exif":
            method, extents = meta.places.get(item, (0, []))
            source = meta.idat if method == 1 else data
            content = b"".join(source[start : start + size] for start, size in extents)
            offset = 4 + int.from_bytes(content[:4])
            return content[offset:] or None
    return None
