"""Reads WebP. The RIFF chunks are parsed here, and libwebp decodes the single frame."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import imagecodecs

from actors.images.metadata import orientation_of
from actors.images.profiles import check_profile_size
from actors.images.samples import IccProfile, Model, OnSize, Samples, split_alpha
from restoration.errors import BrokenImage, UnsupportedImage
from restoration.images import UploadLimits, check_dimensions

_START = 12
_MAX_CHUNKS = 10_000


def read(data: bytes, limits: UploadLimits, on_size: OnSize) -> Samples:
    whole = data[: 8 + int.from_bytes(data[4:8], "little")]
    found, size = dict[bytes, bytes](), (0, 0)
    for name, content in _chunks(whole):
        if name in {b"ANIM", b"ANMF"}:
            raise UnsupportedImage(
                "the file contains more than one image; send each image in its own file"
            )
        if name in {b"VP8X", b"VP8 ", b"VP8L"}:
            size = _size(name, content)
            check_dimensions(*size, limits)
        found.setdefault(name, content)
    on_size(*size)
    profile, exif = found.get(b"ICCP"), found.get(b"EXIF")
    if profile is not None:
        check_profile_size(len(profile))
    if exif is not None:
        exif = exif.removeprefix(b"Exif\0\0")
    values, alpha = split_alpha(imagecodecs.webp_decode(whole))
    colours = IccProfile(profile) if profile else None
    return Samples(values, Model.RGB, alpha, colours, orientation_of(exif), exif)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = _START
    for _ in range(_MAX_CHUNKS):
        if place + 8 > len(data):
            return
        name, size = struct.unpack_from("<4sI", data, place)
        yield name, data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2
    raise BrokenImage("the image cannot be decoded: it has too many chunks")


def _size(name: bytes, content: bytes) -> tuple[int, int]:
    if name == b"VP8X":
        width, height = (int.from_bytes(content[n : n + 3], "little") for n in (4, 7))
        return width + 1, height + 1
    if name == b"VP8L":
        bits = int.from_bytes(content[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", content, 6)
    return width & 0x3FFF, height & 0x3FFF
