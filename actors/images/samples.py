"""The result of a file format's reader: the stored samples, and their colour model and colours."""

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
