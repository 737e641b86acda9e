"""The pictures that the corpus is made of: four quarters that differ, in colours or in greys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = (64, 48)
RED, GREEN, BLUE, SAND = (200, 40, 40), (40, 170, 60), (40, 60, 190), (230, 220, 170)
GREYS = (20, 90, 160, 235)


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer of this status, whose problem has this code."""

    status: int
    code: str

    def __str__(self) -> str:
        return f"{self.status} `{self.code}`"


BROKEN = Refused(422, "broken_image")
OTHER = Refused(415, "unsupported_image")
LARGE = Refused(413, "image_too_large")


@dataclass(frozen=True, slots=True)
class Case:
    """A file, the name and type it is sent under, and what a person expects of it.

    `expected` is the picture as it should look, at the size of the file's, in mode RGB or RGBA.
    `comes_back` describes the answer in `docs/inputs.md`; the file is in its table if it is set.
    """

    what: str
    name: str
    data: bytes
    expected: Image.Image | Refused
    comes_back: str = ""
    content_type: str = "application/octet-stream"


def scene() -> Image.Image:
    """Four quarters in four colours, so that turns and exchanges of channels are seen."""
    return _quarters("RGB", (RED, GREEN, BLUE, SAND))


def grey() -> Image.Image:
    """Four quarters in four greys, of one channel."""
    return _quarters("L", GREYS)


def _quarters(mode: str, colours: tuple[int | tuple[int, int, int], ...]) -> Image.Image:
    picture = Image.new(mode, SIZE)
    width, height = SIZE[0] // 2, SIZE[1] // 2
    for n, colour in enumerate(colours):
        corner = (n % 2 * width, n // 2 * height)
        picture.paste(colour, (*corner, corner[0] + width, corner[1] + height))
    return picture


def grey_expected() -> Image.Image:
    return grey().convert("RGB")


def right_half() -> Image.Image:
    """An alpha channel: opaque on the left, transparent on the right."""
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (SIZE[0] // 2, 0, *SIZE))
    return alpha


def half_alpha() -> Image.Image:
    """An alpha channel of 128 on the left, opaque on the right."""
    alpha = Image.new("L", SIZE, 128)
    alpha.paste(255, (SIZE[0] // 2, 0, *SIZE))
    return alpha


def with_alpha(picture: Image.Image, alpha: Image.Image | None = None) -> Image.Image:
    """The picture in RGBA; its right half is transparent if no other alpha is given."""
    result = picture.convert("RGB").convert("RGBA")
    result.putalpha(alpha or right_half())
    return result


def exchanged() -> Image.Image:
    """The scene with red and green exchanged."""
    red, green, blue = scene().split()
    return Image.merge("RGB", (green, red, blue))


def samples(picture: Image.Image, bits: int = 16) -> NDArray[np.uint16]:
    """The samples of the picture in so many bits, up to 16."""
    scaled: NDArray[np.float64] = np.asarray(picture) / 255 * (2**bits - 1)
    return np.round(scaled).astype(np.uint16)


def linear(picture: Image.Image) -> NDArray[np.float64]:
    """The light of an sRGB picture, 0 to 1."""
    v = np.asarray(picture) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
