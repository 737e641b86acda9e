"""The picture that the corpus is made of: four different quarters, in colour or grey."""

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
    """An error answer with this status, whose problem document has this code."""

    status: int
    code: str

    def __str__(self) -> str:
        return f"{self.status} `{self.code}`"


BROKEN = Refused(422, "broken_image")
OTHER = Refused(415, "unsupported_image")
LARGE = Refused(413, "image_too_large")


@dataclass(frozen=True, slots=True)
class Case:
    """A file, its name and type when sent, and the expected result.

    `expected` is the correct picture, at the size of the file's, in mode RGB or RGBA. `comes_back`
    describes the answer in `docs/inputs.md`; the file is in its table if it is set.
    """

    what: str
    name: str
    data: bytes
    expected: Image.Image | Refused
    comes_back: str = ""
    content_type: str = "application/octet-stream"


def scene() -> Image.Image:
    """Return four quarters in four colours, so that turns and swapped channels are visible."""
    return _quarters("RGB", (RED, GREEN, BLUE, SAND))


def grey() -> Image.Image:
    """Return four quarters in four greys, with one channel."""
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
    """Return an alpha channel that is opaque on the left and transparent on the right."""
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (SIZE[0] // 2, 0, *SIZE))
    return alpha


def half_alpha() -> Image.Image:
    """Return an alpha channel with 128 on the left and opaque on the right."""
    alpha = Image.new("L", SIZE, 128)
    alpha.paste(255, (SIZE[0] // 2, 0, *SIZE))
    return alpha


def with_alpha(picture: Image.Image, alpha: Image.Image | None = None) -> Image.Image:
    """Return the image in RGBA, by default with a transparent right half."""
    result = picture.convert("RGB").convert("RGBA")
    result.putalpha(alpha or right_half())
    return result


def exchanged() -> Image.Image:
    """Return the scene with red and green exchanged."""
    red, green, blue = scene().split()
    return Image.merge("RGB", (green, red, blue))


def samples(picture: Image.Image, bits: int = 16) -> NDArray[np.uint16]:
    """Return the samples of the image with `bits` bits, up to 16."""
    scaled: NDArray[np.float64] = np.asarray(picture) / 255 * (2**bits - 1)
    return np.round(scaled).astype(np.uint16)


def linear(picture: Image.Image) -> NDArray[np.float64]:
    """Return the linear light of an sRGB picture, 0 to 1."""
    v = np.asarray(picture) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
