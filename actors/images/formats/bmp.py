"""Reads BMP: all Windows versions, and version 1 of OS/2."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import BmpImagePlugin, Image

from actors.images.profiles import check_profile_size
from actors.images.samples import (
    Array8or16,
    Calibration,
    Colours,
    IccProfile,
    Model,
    OnSize,
    Samples,
    scaled,
)
from restoration.errors import BrokenImage, UnsupportedImage
from restoration.images import UploadLimits, check_dimensions

_FILE_HEADER = 14
_CORE, _INFO, _V3, _V4, _V5 = 12, 40, 56, 108, 124
_SIZES = {_INFO, 52, _V3, 64, _V4, _V5}
_RGB, _RLE8, _RLE4, _MASKS, _ALPHA_MASKS = 0, 1, 2, 3, 6
_DEFAULT_MASKS = {16: (0x7C00, 0x03E0, 0x001F, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}
_CALIBRATED, _EMBEDDED = 0, b"DEBM"


@dataclass(frozen=True, slots=True)
class _Header:
    size: int
    width: int
    height: int
    top_down: bool
    bits: int
    compression: int
    start: int  # offset of the pixels in the file


def read(data: bytes, limits: UploadLimits, on_size: OnSize) -> Samples:
    header = _header(data)
    check_dimensions(header.width, header.height, limits)
    on_size(header.width, header.height)
    if header.bits in _DEFAULT_MASKS:
        return _of_masks(data, header)
    with Image.open(io.BytesIO(data), formats=[BmpImagePlugin.BmpImageFile.format]) as image:
        image.load()
        grey = image.mode in {"1", "L"}
        values = np.asarray(image.convert("L" if grey else "RGB"))
    if values.shape[:2] != (header.height, header.width):
        raise BrokenImage("the image cannot be decoded: its size differs from its header")
    values = values.reshape(header.height, header.width, -1)
    return Samples(values, Model.GREY if grey else Model.RGB, colours=_colours(data, header))


def _header(data: bytes) -> _Header:
    (start,) = struct.unpack_from("<I", data, 10)
    (size,) = struct.unpack_from("<I", data, _FILE_HEADER)
    if size == _CORE:
        width, height, planes, bits = struct.unpack_from("<HHHH", data, _FILE_HEADER + 4)
        compression = _RGB
    elif size in _SIZES:
        fields = struct.unpack_from("<iiHHI", data, _FILE_HEADER + 4)
        width, height, planes, bits, compression = fields
    else:
        raise BrokenImage(f"the image cannot be decoded: a header of {size} bytes is unknown")
    if width <= 0 or not height or planes != 1:
        raise BrokenImage("the image cannot be decoded: its header is invalid")
    expected = {16: {_RGB, _MASKS, _ALPHA_MASKS}, 32: {_RGB, _MASKS, _ALPHA_MASKS}}
    expected |= {1: {_RGB}, 4: {_RGB, _RLE4}, 8: {_RGB, _RLE8}, 24: {_RGB}}
    if compression not in expected.get(bits, set()):
        raise UnsupportedImage(
            f"BMP with {bits} bits per pixel and compression {compression} is not supported"
        )
    return _Header(size, width, abs(height), height < 0, bits, compression, start)


def _of_masks(data: bytes, header: _Header) -> Samples:
    """Read pixels of 16 or 32 bits whose channels are defined by bit masks."""
    row_bytes = (header.width * header.bits + 31) // 32 * 4
    pixels = data[header.start : header.start + row_bytes * header.height]
    if len(pixels) < row_bytes * header.height:
        raise BrokenImage("the image cannot be decoded: the file is truncated")
    dtype = "<u2" if header.bits == 16 else "<u4"
    rows = np.frombuffer(pixels, dtype).reshape(header.height, -1)[:, : header.width]
    if not header.top_down:
        rows = rows[::-1]
    red, green, blue, transparency = _masks(data, header)
    values = np.stack([_channel(rows, mask) for mask in (red, green, blue)], axis=-1)
    alpha = _channel(rows, transparency) if transparency else None
    if alpha is not None:
        # Programs without support for transparency leave the alpha 0 in an opaque picture.
        alpha = scaled(alpha, 8 * alpha.itemsize) if alpha.any() else None
    if alpha is not None and alpha.dtype != values.dtype:
        alpha, values = _to_16(alpha), _to_16(values)
    return Samples(values, Model.RGB, alpha, _colours(data, header))


def _to_16(values: Array8or16) -> Array8or16:
    return values if values.dtype == np.uint16 else values.astype(np.uint16) * np.uint16(257)


def _masks(data: bytes, header: _Header) -> tuple[int, int, int, int]:
    if header.compression == _RGB:
        return _DEFAULT_MASKS[header.bits]
    has_alpha = header.size >= _V3 or header.compression == _ALPHA_MASKS
    masks = struct.unpack_from("<4I", data, _FILE_HEADER + _INFO)
    red, green, blue, alpha = (mask & (2**header.bits - 1) for mask in masks)
    if not (red and green and blue) or red & green or red & blue or green & blue:
        raise BrokenImage("the image cannot be decoded: its colour masks are invalid")
    return red, green, blue, alpha if has_alpha else 0


def _channel(rows: np.ndarray, mask: int) -> Array8or16:
    shift = (mask & -mask).bit_length() - 1
    bits = (mask >> shift).bit_length()
    values = (rows & mask) >> shift
    if bits > 16:
        values, bits = values >> (bits - 16), 16
    return scaled(values.astype(np.uint16), bits)


def _colours(data: bytes, header: _Header) -> Colours:
    if header.size < _V4:
        return None
    kind = data[_FILE_HEADER + 56 : _FILE_HEADER + 60]
    if kind == _EMBEDDED and header.size >= _V5:
        place, size = struct.unpack_from("<II", data, _FILE_HEADER + 112)
        check_profile_size(size)
        return IccProfile(data[_FILE_HEADER + place : _FILE_HEADER + place + size])
    if int.from_bytes(kind, "little") != _CALIBRATED:
        return None  # sRGB, or a linked profile, whose file was not sent
    ends = np.array(struct.unpack_from("<9i", data, _FILE_HEADER + 60)).reshape(3, 3) / 2**30
    gammas = [g / 2**16 for g in struct.unpack_from("<3I", data, _FILE_HEADER + 96)]
    sums = ends.sum(axis=1)
    if not all(gammas) or (sums <= 0).any() or len(set(gammas)) > 1:
        return None
    white = ends.sum(axis=0)
    xy = [white[:2] / white.sum(), *(ends[:, :2] / sums[:, None])]
    return Calibration(gammas[0], tuple(float(v) for pair in xy for v in pair))
