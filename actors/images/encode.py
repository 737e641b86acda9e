"""Writes pictures: the file that an engine reads, and the file of a result.

ComfyUI works on RGB. Transparency is kept aside and put over the result, unless pixels are moved
about meanwhile: such a picture goes in on white. Blocking, to be called off the event loop.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.images.metadata import bare_png
from actors.images.png import png_of
from actors.images.reader import NormalisedImage
from restoration.jobs import OutputFormat

ENGINE_SUFFIX = ".pnm"  # of the file that `engine_input` makes

_PNG = OutputFormat.PNG


def engine_input(
    image: NormalisedImage, *, on_white: bool
) -> tuple[bytes, NDArray[np.uint8] | None]:
    """A file that ComfyUI's LoadImage reads to exactly these pixels, and the alpha to keep aside.

    It is a binary Netpbm, which an engine reads in a quarter of the time that it takes for a PNG.
    `on_white`: what is transparent shows white, and no alpha is kept.
    """
    if not on_white or image.alpha is None:
        return _pnm(image.pixels), image.alpha
    shown = Image.fromarray(image.pixels[:, :, 0] if image.is_grey else image.pixels)
    white = Image.new(shown.mode, shown.size, "white")
    composed = np.asarray(Image.composite(shown, white, Image.fromarray(image.alpha)))
    return _pnm(composed.reshape(image.pixels.shape)), None


def _pnm(pixels: NDArray[np.uint8]) -> bytes:
    height, width, channels = pixels.shape
    head = netpbm_header(width, height, grey=channels == 1)
    return b"".join([head, np.ascontiguousarray(pixels).data])


def netpbm_header(width: int, height: int, *, grey: bool) -> bytes:
    """The beginning of a binary Netpbm of 8 bits; the samples follow, and nothing else."""
    return f"P{5 if grey else 6}\n{width} {height}\n255\n".encode()


def encode(
    picture: bytes | NDArray[np.uint8],
    output_format: OutputFormat,
    quality: int,
    alpha: NDArray[np.uint8] | None = None,
    exif: bytes | None = None,
    grey: bool = False,
) -> bytes:
    """The engine's picture in the format asked for, with `exif` and no other metadata.

    `picture` is a PNG, or pixels of the shape (height, width, channels).
    Without `alpha` the pixels of a PNG that is to be one are not even decoded. `quality` (1 to 100)
    is for JPEG and WebP. JPEG has no transparency: it shows white instead. With `grey`, R, G and B
    of each pixel are equal, in one channel where the format has it; a WebP is lossless then.
    """
    if output_format is _PNG and alpha is None and not grey:
        if isinstance(picture, bytes):
            return bare_png(picture, exif)
        return png_of(picture, exif)
    with _opened(picture) as image:
        image.load()
        result = _in_mode(image, "L" if grey else "RGB")
    if alpha is not None:
        resized = Image.fromarray(alpha).resize(result.size, Image.Resampling.LANCZOS)
        if output_format is OutputFormat.JPEG:
            white = Image.new(result.mode, result.size, "white")
            result = Image.composite(result, white, resized)
        else:
            result = _in_mode(result, "RGB")
            result.putalpha(resized)
    if output_format is _PNG:
        return png_of(result, exif)
    result.info.clear()  # Pillow makes a PNG's texts the comment of a JPEG
    out = io.BytesIO()
    options: dict[str, Any] = {"quality": quality, "exif": exif or b"", "icc_profile": None}
    if output_format is OutputFormat.WEBP and grey:
        # libwebp's way from YUV to RGB rounds G otherwise than R and B, so only lossless is grey.
        options["lossless"] = True
    result.save(out, output_format.value, **options)
    return out.getvalue()


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    # a copy of 100 megapixels takes 400 MB
    return image if image.mode == mode else image.convert(mode)


def _opened(picture: bytes | NDArray[np.uint8]) -> Image.Image:
    if isinstance(picture, bytes):
        return Image.open(io.BytesIO(picture), formats=["PNG"])
    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
