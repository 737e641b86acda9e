"""The result of a file format's reader: the stored samples, and their colour model and colours.

Also the conversions of samples that several formats need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array8 = NDArray[np.uint8]
Array8or16 = NDArray[Any]  # of uint8 or uint16
# Called with the width and height once a header is accepted, before any pixel is decoded.
OnSize = Callable[[int, int], None]


class Model(Enum):
    GREY = auto()
    RGB = auto()
    CMYK = auto()  # 0 is no ink
    LAB = auto()  # CIELab of TIFF 6.0: a* and b* are signed


@dataclass(frozen=True, slots=True)
class IccProfile:
    data: bytes


@dataclass(frozen=True, slots=True)
class Cicp:
    """Coding-independent code points (ITU-T H.273). `full`: samples use the full range."""

    primaries: int
    transfer: int
    full: bool = True


@dataclass(frozen=True, slots=True)
class Calibration:
    """Samples are linear light to the power 1 / `gamma`. Both fields default to sRGB's values.

    `primaries` are x and y of white, R, G and B.
    """

    gamma: float | None = None
    primaries: tuple[float, ...] | None = None


Colours = IccProfile | Cicp | Calibration | None  # None: sRGB


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """A decoded file.

    `values` has the shape (height, width, channels of the model) and 8 or 16 bits. `alpha` has the
    shape (height, width) and as many bits; `values` are not premultiplied by it. `orientation` is
    EXIF's, 1 to 8. `exif` is the TIFF structure that begins with II or MM.
    """

    values: Array8or16
    model: Model
    alpha: Array8or16 | None = None
    colours: Colours = None
    orientation: int = 1
    exif: bytes | None = None


def split_alpha(values: Array8or16) -> tuple[Array8or16, Array8or16 | None]:
    """Split samples of one to four channels into the colours, with a channel axis, and the alpha.

    Samples without an alpha may have the shape (height, width).
    """
    if values.ndim == 2:
        return values[:, :, None], None
    if values.shape[2] in {2, 4}:
        return values[:, :, :-1], values[:, :, -1]
    return values, None


def scaled(values: Array8or16, bits: int) -> Array8or16:
    """Scale samples of `bits` bits to the full range of 8 bits, or of 16 if `bits` exceeds 8."""
    top = 255 if bits <= 8 else 65_535
    levels = 2**bits - 1
    table = (np.arange(levels + 1, dtype=np.uint64) * top + levels // 2) // levels
    narrow = table.astype(np.uint8 if bits <= 8 else np.uint16)
    found: Array8or16 = narrow[np.minimum(values, levels)]
    return found


def straight(values: Array8or16, alpha: Array8or16) -> Array8or16:
    """Undo the multiplication of the colours by their alpha."""
    top = np.iinfo(values.dtype).max
    result = np.empty_like(values)
    for n in range(len(values)):
        divisor = np.maximum(alpha[n], 1).astype(np.uint32)[:, None]
        row = (values[n].astype(np.uint32) * top + divisor // 2) // divisor
        result[n] = np.minimum(row, top)
    return result
