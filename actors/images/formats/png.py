"""Reads PNG. The chunks are parsed here, and the decoder gets only those of the pixels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import imagecodecs

from actors.images.metadata import orientation_of
from actors.images.png import SIGNATURE, chunk
from actors.images.profiles import MAX_PROFILE_BYTES, check_profile_size
from actors.images.samples import (
    Calibration,
    Cicp,
    Colours,
    IccProfile,
    Model,
    OnSize,
    Samples,
    split_alpha,
)
from restoration.errors import BrokenImage, UnsupportedImage
from restoration.images import UploadLimits, check_dimensions

_HEAD = struct.Struct(">I4s")
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
# Values near 1 / 2.2, as in libpng and browsers: programs write them for sRGB.
_GAMMA_OF_SRGB = range(45_000, 46_001)
_MAX_CHUNKS = 500_000


def read(data: bytes, limits: UploadLimits, on_size: OnSize) -> Samples:
    pixels = [SIGNATURE]  # the chunks for the decoder
    found = dict[bytes, bytes]()  # the first of each other chunk
    size: tuple[int, int] | None = None
    for name, content, whole in _chunks(data):
        if name in _PIXELS:
            if name == b"IHDR":
                width, height = struct.unpack_from(">II", content)
                size = (width, height)
                check_dimensions(*size, limits)
            pixels.append(whole)
        elif name == b"CgBI":
            raise UnsupportedImage(
                "the PNG is in Apple's format for iOS apps (CgBI); convert it to a standard PNG"
            )
        elif not name[0] & 0x20 and name != b"IEND":
            raise BrokenImage(f"the image cannot be decoded: its chunk {name!r} is unknown")
        elif name == b"acTL" and struct.unpack_from(">I", content)[0] > 1:
            raise UnsupportedImage(
                "the file contains more than one image; send each image in its own file"
            )
        else:
            found.setdefault(name, content)
    if size is None:
        raise BrokenImage("the image cannot be decoded: its header is missing")
    on_size(*size)
    decoded = imagecodecs.png_decode(b"".join([*pixels, chunk(b"IEND", b"")]))
    values, alpha = split_alpha(decoded)
    model = Model.GREY if values.shape[2] == 1 else Model.RGB
    exif = found.get(b"eXIf")
    return Samples(values, model, alpha, _colours(found), orientation_of(exif), exif)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield name, content and whole of each chunk, up to IEND or the end of the file.

    Text chunks are skipped, because they may be large.
    """
    place = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if place + _HEAD.size > len(data):
            return
        size, name = _HEAD.unpack_from(data, place)
        end = place + _HEAD.size + size + 4
        if end > len(data):
            raise BrokenImage("the image cannot be decoded: the file is truncated")
        text = name in {b"tEXt", b"zTXt", b"iTXt"}
        if not text:
            yield name, data[place + _HEAD.size : end - 4], data[place:end]
        if name == b"IEND":
            return
        place = end
    raise UnsupportedImage(f"the PNG has more than {_MAX_CHUNKS} chunks; save the image again")


def _colours(found: dict[bytes, bytes]) -> Colours:
    """Choose the colours in the order of precedence of PNG, third edition, 4.3."""
    cicp = found.get(b"cICP", b"")
    if len(cicp) == 4 and cicp[0] != 2 and cicp[2] == 0:
        return Cicp(cicp[0], cicp[1], full=bool(cicp[3]))
    if (profile := _profile(found.get(b"iCCP", b""))) is not None:
        return IccProfile(profile)
    if b"sRGB" in found:
        return None
    gamma = primaries = None
    value = int.from_bytes(content) if len(content := found.get(b"gAMA", b"")) == 4 else 0
    if value and value not in _GAMMA_OF_SRGB:
        gamma = 100_000 / value
    if len(content := found.get(b"cHRM", b"")) == 32:
        xy = tuple(value / 100_000 for value in struct.unpack(">8i", content))
        if all(0 <= value <= 1 for value in xy) and all(xy[1::2]):
            primaries = xy
    return None if gamma is None and primaries is None else Calibration(gamma, primaries)


def _profile(content: bytes) -> bytes | None:
    _, _, rest = content.partition(b"\0")
    if not rest:
        return None
    try:
        profile = zlib.decompressobj().decompress(rest[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return None
    check_profile_size(len(profile))
    return profile
