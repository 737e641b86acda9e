"""Every odd file that people send, and what comes back for it.

`python -m tests.corpus FOLDER` writes the files, for tests of other kinds, and prints the table
that is in `docs/inputs.md`.
"""

from __future__ import annotations

import re
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from restoration.images import MEBIBYTE
from tests.pictures import chunk, deep_colour_png, file, sideways, swapped_primaries

LIMIT_BYTES = 50 * MEBIBYTE
SIZE = (48, 32)
RED, GREEN, BLUE, SAND = (200, 40, 40), (40, 170, 60), (40, 60, 190), (230, 220, 170)


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer of this status, whose problem has this code."""

    status: int
    code: str

    def __str__(self) -> str:
        return f"{self.status} `{self.code}`"


@dataclass(frozen=True, slots=True)
class Case:
    """A file, the name and type it is sent under, and what a person expects of it.

    `expected` is the picture as it should look, at the size of the file's.
    """

    what: str
    name: str
    data: bytes
    expected: Image.Image | Refused
    comes_back: str
    content_type: str = "application/octet-stream"

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.what.lower())


def scene() -> Image.Image:
    """Four quarters in four colours, so that nothing can be turned or exchanged unseen."""
    picture = Image.new("RGB", SIZE)
    width, height = SIZE[0] // 2, SIZE[1] // 2
    for n, colour in enumerate((RED, GREEN, BLUE, SAND)):
        corner = (n % 2 * width, n // 2 * height)
        picture.paste(colour, (*corner, corner[0] + width, corner[1] + height))
    return picture


def _see_through() -> Image.Image:
    """The scene, whose right half is transparent."""
    picture = scene().convert("RGBA")
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (SIZE[0] // 2, 0, *SIZE))
    picture.putalpha(alpha)
    return picture


def _grey() -> Image.Image:
    return scene().convert("L").convert("RGB")


def _deep_grey() -> Image.Image:
    return Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16) * 257)


def _exchanged() -> Image.Image:
    red, green, blue = scene().split()
    return Image.merge("RGB", (green, red, blue))


def _bomb() -> bytes:
    """A PNG of 1 kB that says it is 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def _broken_exif() -> bytes:
    return _jpeg(scene(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(40))


def _jpeg(image: Image.Image, **options: Any) -> bytes:
    return file(image, "JPEG", quality=95, **options)


def _padded(data: bytes, size_bytes: int) -> bytes:
    return data.ljust(size_bytes, b"\0")


_TURNED = _jpeg(scene().rotate(90, expand=True), exif=sideways())
_PAGES = {"save_all": True, "append_images": [ImageOps.mirror(scene())]}
_JPEG = _jpeg(scene())
_PNG = file(scene(), "PNG")
_BROKEN, _OTHER, _LARGE = (
    Refused(422, "broken_image"),
    Refused(415, "unsupported_image"),
    Refused(413, "image_too_large"),
)


def corpus() -> Iterator[Case]:
    yield from _jpegs()
    yield from _other_types()
    yield from _strange()
    yield from _refused()


def _jpegs() -> Iterator[Case]:
    same, upright = "the picture", "the picture, upright"
    yield Case("JPEG", "a.jpg", _JPEG, scene(), same, "image/jpeg")
    yield Case(
        "JPEG, progressive",
        "a.jpg",
        _jpeg(scene(), progressive=True),
        scene(),
        same,
    )
    yield Case("JPEG, turned by EXIF", "a.jpg", _TURNED, scene(), upright)
    yield Case(
        "JPEG in grey",
        "a.jpg",
        _jpeg(scene().convert("L")),
        _grey(),
        "the picture, in RGB",
    )
    yield Case(
        "JPEG in CMYK",
        "a.jpg",
        _jpeg(scene().convert("CMYK")),
        scene(),
        "the picture, in RGB",
    )
    yield Case(
        "JPEG with a colour profile",
        "a.jpg",
        _jpeg(scene(), icc_profile=swapped_primaries()),
        _exchanged(),
        "the colours that the profile means, in sRGB",
    )


def _other_types() -> Iterator[Case]:
    same = "the picture"
    yield Case(
        "PNG with transparency",
        "a.png",
        file(_see_through(), "PNG"),
        _see_through(),
        "the picture, as transparent as it was (white in a JPEG)",
    )
    yield Case("PNG with a palette", "a.png", file(scene().quantize(16), "PNG"), scene(), same)
    yield Case(
        "PNG in 16 bits of grey",
        "a.png",
        file(_deep_grey(), "PNG"),
        _grey(),
        "the picture, in 8 bits of RGB",
    )
    yield Case(
        "PNG in 16 bits of colour",
        "a.png",
        deep_colour_png(scene()),
        scene(),
        "the picture, in 8 bits",
    )
    yield Case("WebP", "a.webp", file(scene(), "WEBP", quality=95), scene(), same)
    yield Case(
        "WebP with transparency",
        "a.webp",
        file(_see_through(), "WEBP", lossless=True),
        _see_through(),
        "the picture, as transparent as it was",
    )
    yield Case("TIFF", "a.tif", file(scene(), "TIFF", compression="tiff_lzw"), scene(), same)
    yield Case("BMP", "a.bmp", file(scene(), "BMP"), scene(), same)


def _strange() -> Iterator[Case]:
    """Files that look wrong, and can be restored all the same."""
    one = Image.new("RGB", (1, 1), RED)
    ignored = "the picture; what follows it is never read"
    yield Case("1x1", "a.png", file(one, "PNG"), one, "the picture")
    yield Case("Wrong extension", "a.jpg", _PNG, scene(), "the picture: the content decides")
    yield Case(
        "Wrong type", "a.png", _PNG, scene(), "the picture: the content decides", "text/html"
    )
    yield Case("Broken metadata", "a.jpg", _broken_exif(), scene(), "the picture, as it lies")
    yield Case(
        "Polyglot, a ZIP behind a JPEG", "a.jpg", _JPEG + b"PK\3\4" + bytes(300), scene(), ignored
    )
    yield Case("50 MiB", "a.jpg", _padded(_JPEG, LIMIT_BYTES), scene(), "the picture")


def _refused() -> Iterator[Case]:
    """Files of which nothing gets further than the first process."""
    long = Image.new("RGB", (20_000, 1), SAND)
    pages = "one file may hold one picture"
    yield Case("Nothing at all", "a.jpg", b"", Refused(400, "invalid_request"), "it is empty")
    yield Case("Truncated JPEG", "a.jpg", _JPEG[:-200], _BROKEN, "it does not decode")
    yield Case("Truncated PNG", "a.png", _PNG[:-30], _BROKEN, "it does not decode")
    yield Case(
        "Text named .jpg", "a.jpg", b"no picture at all", _OTHER, "the types that are", "image/jpeg"
    )
    yield Case("GIF", "a.gif", file(scene(), "GIF"), _OTHER, "the types that are")
    yield Case(
        "SVG", "a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", _OTHER, "the types that are"
    )
    yield Case(
        "Polyglot, a JPEG in a PDF", "a.jpg", b"%PDF-1.7\n" + _JPEG, _OTHER, "the types that are"
    )
    yield Case("PNG, animated", "a.png", file(scene(), "PNG", **_PAGES), _OTHER, pages)
    yield Case("WebP, animated", "a.webp", file(scene(), "WEBP", **_PAGES), _OTHER, pages)
    yield Case("TIFF with many pages", "a.tif", file(scene(), "TIFF", **_PAGES), _OTHER, pages)
    yield Case(
        "TIFF in 32 bits",
        "a.tif",
        file(Image.new("F", SIZE), "TIFF"),
        _OTHER,
        "nobody knows what is white in it",
    )
    yield Case("Decompression bomb", "a.png", _bomb(), _LARGE, "its pixels, and the limit")
    yield Case("20,000x1", "a.png", file(long, "PNG"), _LARGE, "its sides, and the limit")
    yield Case("50 MiB and one byte", "a.jpg", _padded(_JPEG, LIMIT_BYTES + 1), _LARGE, "the limit")


def table() -> str:
    """The corpus in Markdown."""
    lines = ["| What is sent | Answer | What comes back, or is said |", "|---|---|---|"]
    for case in corpus():
        answer = case.expected if isinstance(case.expected, Refused) else "202"
        lines.append(f"| {case.what} | {answer} | {case.comes_back} |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case in corpus():
        (folder / f"{case.slug}{Path(case.name).suffix}").write_bytes(case.data)
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
