"""Encodes the engine's input file and the result's file.

ComfyUI works on RGB, so the alpha channel is kept aside and applied to the result. For workflows
that move pixels the alpha would not fit, so the picture is composed on white instead. The functions
block: call them off the event loop.
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

ENGINE_SUFFIX = ".pnm"  # file name extension of `engine_input`

_PNG = OutputFormat.PNG


def engine_input(
    image: NormalisedImage, *, on_white: bool
) -> tuple[bytes, NDArray[np.uint8] | None]:
    """Return the file for ComfyUI's LoadImage, and the alpha channel to keep aside.

    The file is a binary Netpbm with exactly these pixels; an engine reads it in a quarter of the
    time of a PNG. With `on_white` the picture is composed on white, and the alpha is None.
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
    """Return the header of a binary Netpbm with 8 bits. The file continues with the samples."""
    return f"P{5 if grey else 6}\n{width} {height}\n255\n".encode()


def encode(
    picture: bytes | NDArray[np.uint8],
    output_format: OutputFormat,
    quality: int,
    alpha: NDArray[np.uint8] | None = None,
    exif: bytes | None = None,
    grey: bool = False,
) -> bytes:
    """Return the engine's picture in the given format, with `exif` as its only metadata.

    `picture` is a PNG, or an array of shape (height, width, channels). A PNG that needs neither
    alpha, grey nor another format is copied without decoding its pixels. `quality` (1 to 100) is
    for JPEG and WebP. With `alpha` a JPEG is composed on white, because it has no transparency.
    With `grey` the result has one channel, or equal R, G and B where the format or the alpha
    requires RGB; a grey WebP is lossless. Raises EngineFailed, or an error of Pillow, for broken
    PNG data.
    """
    if output_format is _PNG and alpha is None and not grey:
        if isinstance(picture, bytes):
            return bare_png(picture, exif)
        return png_of(picture, exif)
    if isinstance(picture, bytes):
        image: Image.Image = Image.open(io.BytesIO(picture), formats=["PNG"])
    else:
        image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    with image:
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
    result.info.clear()  # Pillow would write a PNG's texts as the comment of a JPEG
    out = io.BytesIO()
    options: dict[str, Any] = {"quality": quality, "exif": exif or b"", "icc_profile": None}
    if output_format is OutputFormat.WEBP and grey:
        # libwebp's conversion from YUV rounds G differently, so only lossless keeps R = G = B.
        options["lossless"] = True
    result.save(out, output_format.value, **options)
    return out.getvalue()


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    # Without a needless copy, which takes 400 MB for 100 megapixels.
    return image if image.mode == mode else image.convert(mode)
