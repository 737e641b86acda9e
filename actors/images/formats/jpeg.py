"""Reads JPEG: the first picture in the file, of any process but hierarchical, of 2 to 16 bits.

The decoder gets only the tables, the frame, the scans, and the JFIF and Adobe markers. Profile and
EXIF are read here, and all other segments are dropped.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

import imagecodecs
import numpy as np

from actors.images.metadata import orientation_of
from actors.images.profiles import check_profile_size
from actors.images.samples import Array8or16, IccProfile, Model, OnSize, Samples, scaled
from restoration.errors import BrokenImage, UnsupportedImage
from restoration.images import UploadLimits, check_dimensions

# Encoders write 10 to 20 scans, or a few dozen when they optimize the file size. Each scan may cost
# the decoder a pass over all coefficients, and may have only 10 bytes.
MAX_SCANS = 100

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOS, _DHT, _DQT, _DAC, _DRI = 0xDA, 0xC4, 0xDB, 0xCC, 0xDD
_JFIF, _EXIF, _ICC, _ADOBE = 0xE0, 0xE1, 0xE2, 0xEE
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_LOSSLESS, _ARITHMETIC, _PROGRESSIVE = 0xC3, {0xC9, 0xCA}, {0xC2, 0xCA}
_FRAMES = {0xC0, 0xC1, 0xC2, _LOSSLESS, *_ARITHMETIC}
_OTHER_FRAMES = {0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE}
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_ICC_NAME, _EXIF_NAME, _ADOBE_NAME = b"ICC_PROFILE\0", b"Exif\0", b"Adobe"
# Appended to the last scan to detect that it is truncated; see `_check_whole`. No byte is 0xFF.
_TAIL = bytes((n * 167 + 13) % 255 for n in range(1, 1_000))
_COEFFICIENTS = 64


@dataclass(slots=True)
class _File:
    kept: list[bytes] = field(default_factory=lambda: [_SOI])
    frame: int = 0
    bits: int = 8
    width: int = 0
    height: int = 0
    components: tuple[int, ...] = ()
    scans: int = 0
    adobe: bool = False
    ended: bool = False
    exif: bytes | None = None
    icc: dict[int, bytes] = field(default_factory=dict)
    icc_count: int = 0
    # (component, coefficient): the number of low bits still missing; without an entry, all bits.
    missing: dict[tuple[int, int], int] = field(default_factory=dict)


def read(data: bytes, limits: UploadLimits, on_size: OnSize) -> Samples:
    file = _parsed(data, limits)
    on_size(file.width, file.height)
    values = _decoded(file)
    _check_whole(file, values)
    if file.bits != 8:
        values = scaled(values, file.bits)
    model = {1: Model.GREY, 3: Model.RGB, 4: Model.CMYK}[len(file.components)]
    if model is Model.CMYK and file.adobe:  # Adobe stores inverted inks
        values = np.iinfo(values.dtype).max - values
    numbers = range(1, file.icc_count + 1)
    complete = all(number in file.icc for number in numbers)
    profile = b"".join(file.icc[number] for number in numbers) if complete else b""
    return Samples(
        values.reshape(file.height, file.width, -1),
        model,
        colours=IccProfile(profile) if profile else None,
        orientation=orientation_of(file.exif),
        exif=file.exif,
    )


def _parsed(data: bytes, limits: UploadLimits) -> _File:
    file, place = _File(), len(_SOI)
    while not file.ended and (found := _MARKER.search(data, place)):
        marker, place = found[1][0], found.end()
        if marker == _EOI[1]:
            file.ended = True
        elif marker in _STANDALONE:
            continue
        else:
            size = int.from_bytes(data[place : place + 2])
            payload = data[place + 2 : place + size]
            if size < 2 or place + size > len(data) or marker == _SOI[1]:
                break  # not a segment: data after a missing end marker
            place += size
            _take(file, marker, payload, limits)
            if marker == _SOS:
                end = _MARKER.search(data, place)
                stop = end.start() if end else len(data)
                file.kept.append(data[place:stop])
                place = stop
    if not file.scans:
        raise BrokenImage("the image cannot be decoded: it has no scan")
    if not file.ended:
        # Remove the padding of a file of fixed size, but keep up to two zero bytes, with which a
        # scan may end.
        scan = file.kept[-1].rstrip(b"\0").rstrip(b"\xff")
        file.kept[-1] = scan + file.kept[-1][len(scan) :][:2].rstrip(b"\xff")
    return file


def _take(file: _File, marker: int, payload: bytes, limits: UploadLimits) -> None:
    whole = bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload
    if marker in _FRAMES:
        if file.frame:
            raise BrokenImage("the image cannot be decoded: it has more than one frame")
        _take_frame(file, marker, payload, limits)
        file.kept.append(whole)
    elif marker in _OTHER_FRAMES:
        raise UnsupportedImage(
            "hierarchical JPEG is not supported; save the image as a baseline or progressive JPEG"
        )
    elif marker == _SOS:
        _take_scan(file, payload)
        file.kept.append(whole)
    elif marker in {_DHT, _DQT, _DAC, _DRI}:
        file.kept.append(whole)
    elif marker == _JFIF and payload.startswith(b"JFIF\0"):
        file.kept.append(bytes.fromhex("ffe00010") + payload[:12] + b"\0\0")  # without a thumbnail
    elif marker == _ADOBE and payload.startswith(_ADOBE_NAME):
        file.adobe = True
        file.kept.append(whole)
    elif marker == _EXIF and payload.startswith(_EXIF_NAME) and file.exif is None:
        file.exif = payload[6:]
    elif marker == _ICC and payload.startswith(_ICC_NAME) and len(payload) > 14:
        file.icc[payload[12]], file.icc_count = payload[14:], payload[13]
        check_profile_size(sum(map(len, file.icc.values())))


def _take_frame(file: _File, marker: int, payload: bytes, limits: UploadLimits) -> None:
    bits, height, width, count = struct.unpack_from(">BHHB", payload)
    if not height or not width or not count:
        raise BrokenImage("the image cannot be decoded: its frame header has no size")
    check_dimensions(width, height, limits)
    depths = range(2, 17) if marker == _LOSSLESS else (8, 12)
    if count not in {1, 3, 4} or bits not in depths:
        raise UnsupportedImage(f"JPEG with {count} components of {bits} bits is not supported")
    file.frame, file.bits, file.width, file.height = marker, bits, width, height
    file.components = tuple(payload[6 + 3 * n] for n in range(count))


def _take_scan(file: _File, payload: bytes) -> None:
    file.scans += 1
    if not file.frame:
        raise BrokenImage("the image cannot be decoded: a scan comes before the frame header")
    if file.scans > MAX_SCANS:
        raise UnsupportedImage(
            f"the JPEG has more than {MAX_SCANS} scans; save the image again as a baseline JPEG",
            max_scans=MAX_SCANS,
        )
    count = payload[0]
    first, last, approximation = payload[1 + 2 * count : 4 + 2 * count]
    if file.frame not in _PROGRESSIVE:
        first, last, approximation = 0, _COEFFICIENTS - 1, 0
    for n in range(count):
        for coefficient in range(first, min(last, _COEFFICIENTS - 1) + 1):
            file.missing[payload[1 + 2 * n], coefficient] = approximation & 15


def _decoded(file: _File, tail: bytes = b"") -> Array8or16:
    spaces = {1: "GRAYSCALE", 3: "RGB", 4: "CMYK"}
    # The decoder cannot convert the colours of lossless JPEG.
    space = None if file.frame == _LOSSLESS else spaces[len(file.components)]
    data = b"".join([*file.kept, tail, _EOI])
    values: Array8or16 = imagecodecs.jpeg8_decode(data, outcolorspace=space)
    if values.shape[:2] != (file.height, file.width):
        raise BrokenImage("the image cannot be decoded: its size differs from its frame header")
    return values


def _check_whole(file: _File, values: Array8or16) -> None:
    """Raise BrokenImage if a part of the picture is missing.

    The decoder makes up the rest of a truncated scan. If arbitrary bytes appended to the last scan
    change any pixel, the scan was truncated; a complete picture stays the same.
    """
    begun = {component for component, _ in file.missing}
    coded = len(file.missing) == _COEFFICIENTS * len(file.components)
    if (
        begun != set(file.components)
        or any(file.missing.values())
        or not (coded or file.ended)
        or (
            file.frame not in _ARITHMETIC  # its encoders omit zeros at the end
            and not np.array_equal(values, _decoded(file, _TAIL))
        )
    ):
        raise BrokenImage("the image cannot be decoded: a part of the file is missing")
