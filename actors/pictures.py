"""Pillow's two jobs: to prove that an upload is one whole picture, and to write a result.

Both are plain blocking functions, to be called off the event loop.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from restoration.errors import BrokenImage, UnsupportedImage
from restoration.images import ImageType, UploadLimits, check_dimensions, check_size_bytes, sniff
from restoration.jobs import OutputFormat

# Pillow is told which decoder to use, so that no other of its many parsers sees an upload.
_DECODERS = {
    ImageType.JPEG: "JPEG",
    ImageType.PNG: "PNG",
    ImageType.WEBP: "WEBP",
    ImageType.TIFF: "TIFF",
    ImageType.BMP: "BMP",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """An upload that was decoded to its last pixel."""

    type: ImageType
    width: int
    height: int


def examine(data: bytes, limits: UploadLimits) -> Picture:
    """Decode `data` in full.

    Raises ImageTooLarge (checked before any pixel is decoded), UnsupportedImage, BrokenImage.
    """
    check_size_bytes(len(data), limits)
    kind = sniff(data)
    try:
        with warnings.catch_warnings():
            # The size is checked against our own limit, which is lower than Pillow's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=[_DECODERS[kind]]) as image:
                check_dimensions(image.width, image.height, limits)
                if getattr(image, "n_frames", 1) > 1:
                    raise UnsupportedImage(
                        "the file holds more than one picture; send each as a file of its own"
                    )
                image.load()
                return Picture(kind, image.width, image.height)
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"the picture cannot be decoded: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        # what Pillow's decoders raise for broken files, by its documentation and in its tests
        raise BrokenImage(f"the picture cannot be decoded: {error}") from error


def encode(png: bytes, output_format: OutputFormat, quality: int) -> bytes:
    """The engine's PNG in the format asked for; a PNG passes through untouched.

    `quality` (1 to 100) is for JPEG and WebP.
    """
    if output_format is OutputFormat.PNG:
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.convert("RGB").save(out, format=output_format.value, quality=quality)
    return out.getvalue()
