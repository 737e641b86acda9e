"""Small ICC profiles, one of each kind, made by hand from the specification (ICC.1:2022)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import ImageCms

Primaries = Sequence[tuple[float, float, float]]  # XYZ of red, green and blue, adapted to D50
SRGB: Primaries = (
    (0.43607, 0.22249, 0.01392),
    (0.38515, 0.71687, 0.09708),
    (0.14307, 0.06061, 0.71410),
)
P3: Primaries = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)
EXCHANGED: Primaries = (SRGB[1], SRGB[0], SRGB[2])
WHITE = (0.9642, 1.0, 0.8249)
_DATE = (2024, 1, 1, 0, 0, 0)


def srgb() -> bytes:
    return bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


def rgb(
    gamma: float,
    name: str = "a camera",
    primaries: Primaries = SRGB,
    extra: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Return a profile of three curves and a matrix."""
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries), strict=True)
    curves = [(tag, curve(gamma)) for tag in (b"rTRC", b"gTRC", b"bTRC")]
    return profile(b"RGB ", name, [*columns, *curves, *extra])


def grey(gamma: float, name: str = "a scanner") -> bytes:
    return profile(b"GRAY", name, [(b"kTRC", curve(gamma))])


def cmyk(exchange: bool = False) -> bytes:
    """Return a press profile with the inks of Pillow's own conversion, as 9 steps a channel.

    With `exchange`, cyan and magenta are swapped.
    """
    steps = np.linspace(0, 1, 9)
    c, m, y, k = np.meshgrid(steps, steps, steps, steps, indexing="ij")
    if exchange:
        c, m = m, c
    light = (1 - np.stack([c, m, y], axis=-1)) * (1 - k)[..., None]
    return profile(b"CMYK", "a press", [(b"A2B0", _table(_lab(light), 4))], b"prtr", b"Lab ")


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert sRGB samples from 0 to 1 to CIELab under D50."""
    light = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = light @ np.array(SRGB) / np.array(WHITE)
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _table(lab: NDArray[np.float64], channels: int) -> bytes:
    """Return a lut16Type of Lab values in the encoding of version 2, where 65280 is L* 100."""
    low = np.array([0, -128, -128])
    values = np.clip((lab - low) / np.array([100, 255, 255]) * 65_280, 0, 65_535)
    head = b"mft2" + bytes(4) + bytes([channels, 3, lab.shape[0], 0])
    matrix = b"".join(s15(v) for v in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    straight = struct.pack(">HH", 0, 65_535)
    body: bytes = np.round(values).astype(">u2").tobytes()
    return head + matrix + struct.pack(">HH", 2, 2) + straight * channels + body + straight * 3


def of_elements(count: int) -> bytes:
    """Return a profile whose D2B0 is a pipeline of `count` matrices that share the same bytes."""
    identity = struct.pack(">12f", 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    matrix = b"matf" + bytes(4) + struct.pack(">HH", 3, 3) + identity
    head = b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, count)
    places = struct.pack(">II", len(head) + 8 * count, len(matrix)) * count
    return profile(b"RGB ", "x", [(b"D2B0", head + places + matrix)], version=0x04300000)


def profile(
    space: bytes,
    name: str,
    tags: Sequence[tuple[bytes, bytes]],
    kind: bytes = b"mntr",
    pcs: bytes = b"XYZ ",
    version: int = 0x02400000,
) -> bytes:
    every = [(b"desc", description(name)), (b"cprt", _text("CC0")), (b"wtpt", xyz(WHITE)), *tags]
    start, table, body = 128 + 4 + 12 * len(every), b"", b""
    for tag, data in every:
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    rest = struct.pack(">I", len(every)) + table + body
    head = struct.pack(">I4sI4s4s4s", 128 + len(rest), b"lcms", version, kind, space, pcs)
    head += struct.pack(">6H", *_DATE) + b"acsp" + bytes(28) + b"".join(map(s15, WHITE))
    return head.ljust(128, b"\0") + rest


def description(name: str) -> bytes:
    text = name.encode() + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(8 + 3 + 67)


def curve(gamma: float) -> bytes:
    if gamma == 1:
        return b"curv" + bytes(4) + struct.pack(">I", 0)
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(s15, values))


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65_536))


def _text(text: str) -> bytes:
    return b"text" + bytes(4) + text.encode() + b"\0"
