"""Proves that an upload is one whole picture of a type and size that can be restored.

A plain blocking function; what nobody has vouched for yet, `actors.decoders` gives to it in a
process of its own.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import (
    BmpImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from restoration.errors import BrokenImage, ImageTooLarge, InvalidRequest, UnsupportedImage
from restoration.images import ImageType, UploadLimits, check_dimensions, check_size_bytes, sniff

# Pillow is told which decoder to use, so that no other of its many parsers sees an upload. It
# loads all of them when it is asked for one that is not there; so these are imported.
DECODERS = {
    ImageType.JPEG: JpegImagePlugin.JpegImageFile.format,
    ImageType.PNG: PngImagePlugin.PngImageFile.format,
    ImageType.WEBP: WebPImagePlugin.WebPImageFile.format,
    ImageType.TIFF: TiffImagePlugin.TiffImageFile.format,
    ImageType.BMP: BmpImagePlugin.BmpImageFile.format,
}
_32_BITS = {"I", "F"}


@dataclass(frozen=True, slots=True)
class Picture:
    """An upload that was decoded to its last pixel; its size is that of the picture upright."""

    type: ImageType
    width: int
    height: int


def examine(data: bytes, limits: UploadLimits) -> Picture:
    """Decode `data` in full.

    Raises ImageTooLarge (checked before any pixel is decoded), UnsupportedImage, BrokenImage, and
    MemoryError, which says as much about the process as about the picture.
    """
    check_size_bytes(len(data), limits)
    kind = sniff(data)
    try:
        with Image.open(io.BytesIO(data), formats=[DECODERS[kind]]) as image:
            _check_header(image, kind, limits)
            image.load()
            upright = ImageOps.exif_transpose(image)  # as the engine will; broken EXIF fails
            return Picture(kind, upright.width, upright.height)
    except (InvalidRequest, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(
            f"the image has far more than the {limits.max_pixels} pixels that are accepted",
            max_pixels=limits.max_pixels,
        ) from error
    except UnidentifiedImageError as error:
        raise BrokenImage("the picture cannot be decoded: its header is broken") from error
    except Exception as error:  # decoders raise anything: TypeError and KeyError, when fuzzed
        raise BrokenImage(f"the picture cannot be decoded: {error}") from error


def _check_header(image: Image.Image, kind: ImageType, limits: UploadLimits) -> None:
    """Refuse what is too large, or what the engine would not restore as a whole."""
    check_dimensions(image.width, image.height, limits)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A decoder needs room for a whole tile, however small the picture in it.
        wide = int(image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 1))
        high = int(image.tag_v2.get(TiffImagePlugin.TILELENGTH, 1))
        check_dimensions(wide, high, limits)
    # Not `n_frames`: to count a TIFF's pictures takes minutes if it has enough of them. A JPEG's
    # further pictures are previews that cameras add (MPO); ComfyUI takes the photo, which is first.
    if kind is not ImageType.JPEG and getattr(image, "is_animated", False):
        raise UnsupportedImage(
            "the file holds more than one picture; send each as a file of its own"
        )
    if image.mode in _32_BITS:
        raise UnsupportedImage(
            "the picture has samples of 32 bits, for which black and white are not defined; "
            "send 8 or 16 bits"
        )
