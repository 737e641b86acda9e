"""Parses ICC profiles (ICC.1:2022), and evaluates only the parts that the picture needs.

A profile is parsed to tone curves and a matrix, or rebuilt with the one lookup table that is used.
Multi-process elements (D2Bx, B2Dx) are ignored, because their cost is not bounded by their size.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageCms

from restoration.errors import UnsupportedImage

# Profiles of presses and scanners have up to 3 MB, those of monitors with tables 2 MB.
MAX_PROFILE_BYTES = 8 * 2**20
# Press profiles have 17 steps for each of four channels (83,521 nodes), some 23 (279,841).
_MAX_NODES = 2_000_000
_MAX_TAGS = 200
_HEADER = struct.Struct(">I4sI4s4s4s12s4s28s12s")
_HEADER_BYTES = 128
_TAG = struct.Struct(">4sII")
_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")
_CHANNELS = {b"GRAY": 1, b"RGB ": 3, b"CMYK": 4}

Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Tags = dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Tone curves of the channels, and XYZ under D50 of their primaries as rows."""

    curves: tuple[Curve, ...]
    primaries: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Table:
    """A profile for Little CMS that contains only the lookup table to the PCS."""

    data: bytes


class _Unusable(Exception):
    """The profile is broken or unsupported."""


def check_profile_size(size_bytes: int) -> None:
    """Raise UnsupportedImage above MAX_PROFILE_BYTES."""
    if size_bytes > MAX_PROFILE_BYTES:
        raise UnsupportedImage(
            f"the colour profile of the image is larger than {MAX_PROFILE_BYTES // 2**20} "
            "MiB; convert the image to sRGB"
        )


def parse(data: bytes, space: bytes) -> Matrix | Table | None:
    """Parse a profile for the colour space `RGB `, `GRAY` or `CMYK`.

    Return None for a profile that is broken or for another space. Raises UnsupportedImage for one
    that is too large.
    """
    check_profile_size(len(data))
    try:
        return _parse(data, space)
    except (_Unusable, struct.error, ValueError, IndexError):
        return None


def _parse(data: bytes, space: bytes) -> Matrix | Table | None:
    size, _, _, kind, found, pcs, _, signature, _, _ = _HEADER.unpack_from(data)
    if signature != b"acsp" or found != space or kind not in _CLASSES or size > len(data):
        return None
    tags = _tags(data)
    for name in (b"A2B0", b"A2B1", b"A2B2"):
        if name in tags and _is_usable_table(tags[name], _CHANNELS[space]):
            white: Tags = {name: tags[name] for name in (b"wtpt", b"chad") if name in tags}
            return Table(_rebuilt(data, {b"A2B0": tags[name], **white}))
    if space == b"GRAY" and pcs in {b"XYZ ", b"Lab "}:
        curve = _curve(tags[b"kTRC"]) if b"kTRC" in tags else None
        if curve is None:
            return None
        return Matrix((_from_lightness(curve) if pcs == b"Lab " else curve,), np.ones((1, 3)))
    names = [(b"rTRC", b"rXYZ"), (b"gTRC", b"gXYZ"), (b"bTRC", b"bXYZ")]
    if space != b"RGB " or pcs != b"XYZ " or any(n not in tags for pair in names for n in pair):
        return None
    primaries = np.array([_xyz(tags[xyz]) for _, xyz in names])
    return Matrix(tuple(_curve(tags[trc]) for trc, _ in names), primaries)


def _tags(data: bytes) -> Tags:
    (count,) = struct.unpack_from(">I", data, _HEADER_BYTES)
    if count > _MAX_TAGS:
        raise _Unusable
    tags = {}
    for n in range(count):
        name, start, size = _TAG.unpack_from(data, _HEADER_BYTES + 4 + n * _TAG.size)
        if start + size <= len(data):
            tags[name] = data[start : start + size]
    return tags


def _xyz(tag: bytes) -> list[float]:
    kind, *values = struct.unpack_from(">4s4x3i", tag)
    if kind != b"XYZ ":
        raise _Unusable
    return [value / 65_536 for value in values]


def _curve(tag: bytes) -> Curve:
    if tag[:4] == b"para":
        return _parametric_curve(tag)
    if tag[:4] != b"curv":
        raise _Unusable
    (count,) = struct.unpack_from(">I", tag, 8)
    if count == 0:
        return lambda v: v
    values = np.frombuffer(tag, ">u2", count, 12).astype(np.float64)
    if count == 1:
        gamma = values[0] / 256
        return lambda v: v**gamma
    places = np.linspace(0, 1, count)
    return lambda v: np.interp(v, places, values / 65_535)


def _parametric_curve(tag: bytes) -> Curve:
    """Parse a parametric curve: y = (a x + b)^g + e if x >= d, else c x + f.

    ICC.1:2022, table 68.
    """
    (kind,) = struct.unpack_from(">H", tag, 8)
    counts = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7}
    if kind not in counts:
        raise _Unusable
    found = [v / 65_536 for v in struct.unpack_from(f">{counts[kind]}i", tag, 12)]
    g, a, b, c, d, e, f = 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0
    match kind:
        case 0:
            (g,) = found
        case 1 | 2:
            g, a, b = found[:3]
            if not a:
                raise _Unusable
            d = -b / a
            e = f = found[3] if kind == 2 else 0.0
        case 3:
            g, a, b, c, d = found
        case 4:
            g, a, b, c, d, e, f = found

    def curve(v: NDArray[np.float64]) -> NDArray[np.float64]:
        power = np.maximum(a * v + b, 0) ** g + e
        light: NDArray[np.float64] = np.where(v >= d, power, c * v + f)
        if not np.isfinite(light).all():
            raise _Unusable
        return np.clip(light, 0, 1)

    curve(np.linspace(0, 1, 256))
    return curve


def _from_lightness(curve: Curve) -> Curve:
    """Convert a curve to L*, of a grey profile whose PCS is Lab, to a curve to linear light."""

    return lambda v: from_lab((curve(v) * 100 + 16) / 116)


def from_lab(f: NDArray[Any]) -> NDArray[Any]:
    """Return X, Y or Z in relation to white. `f` is its function in CIELab (ISO/CIE 11664-4)."""
    return np.where(f > 6 / 29, f**3, (116 * f - 16) * (27 / 24_389))


def _is_usable_table(tag: bytes, channels: int) -> bool:
    """Return whether the table has one input for each channel and at most _MAX_NODES nodes."""
    if tag[:4] not in (b"mft1", b"mft2", b"mAB ") or tag[8] != channels or tag[9] != 3:
        return False
    steps = [tag[10]] * channels
    if tag[:4] == b"mAB ":
        (place,) = struct.unpack_from(">I", tag, 24)
        steps = list(tag[place : place + channels]) if place else [2]
    return min(steps) >= 2 and math.prod(steps) <= _MAX_NODES


def _rebuilt(data: bytes, tags: Tags) -> bytes:
    """Return a profile with the header of `data` and only these tags."""
    table, body, start = b"", b"", _HEADER_BYTES + 4 + _TAG.size * len(tags)
    for name, content in tags.items():
        table += _TAG.pack(name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = start + len(body)
    header = struct.pack(">I", size) + data[4:84] + bytes(44)  # drops the profile's id (MD5)
    return header + struct.pack(">I", len(tags)) + table + body


@functools.cache
def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
