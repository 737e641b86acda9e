"""Decodes uploads to upright sRGB pixels with 8 bits a channel, and a separate alpha channel.

`examine` accepts exactly the files that `read` does. Both block and handle untrusted data: call
them in an image process. docs/decisions/0028-read-uploads-with-one-reader.md names the decoder of
each format and the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from actors.images.colour import to_8_bits, to_srgb
from actors.images.formats import bmp, heif, jpeg, png, tiff, webp
from actors.images.metadata import kept_exif
from actors.images.profiles import srgb_profile
from actors.images.samples import OnSize, Samples
from restoration.errors import BrokenImage, InvalidRequest
from restoration.images import ImageType, UploadLimits, check_size_bytes, sniff

_READERS: dict[ImageType, Callable[[bytes, UploadLimits, OnSize], Samples]] = {
    ImageType.JPEG: jpeg.read,
    ImageType.PNG: png.read,
    ImageType.WEBP: webp.read,
    ImageType.TIFF: tiff.read,
    ImageType.BMP: bmp.read,
    ImageType.HEIC: heif.read_heic,
    ImageType.AVIF: heif.read_avif,
}

# imagecodecs imports each codec's module on first use.
_CODECS = (
    "avif_decode",
    "bitorder_decode",
    "ccittfax3_decode",
    "ccittfax4_decode",
    "ccittrle_decode",
    "cms_transform",
    "delta_decode",
    "jpeg8_decode",
    "jpeg_decode",
    "lzw_decode",
    "packbits_decode",
    "packints_decode",
    "png_decode",
    "webp_decode",
    "zlib_decode",
    "zstd_decode",
)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """A completely decoded upload. `width` and `height` are in pixels, of the upright picture."""

    type: ImageType
    width: int
    height: int


@dataclass(frozen=True, slots=True, eq=False)
class NormalisedImage:
    """An upright picture in sRGB with 8 bits a channel.

    `pixels` has the shape (height, width, channels), with 3 channels, or 1 if the whole picture is
    grey. `alpha` has the shape (height, width), and is None if the picture is opaque. `exif` is the
    metadata for the result, if it was requested and exists.
    """

    type: ImageType
    pixels: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None
    exif: bytes | None = None

    @property
    def is_grey(self) -> bool:
        return bool(self.pixels.shape[2] == 1)

    @property
    def info(self) -> ImageInfo:
        height, width, _ = self.pixels.shape
        return ImageInfo(self.type, width, height)


def load_decoders() -> None:
    """Import all modules that reading needs, before the process may no longer open files."""
    for codec in _CODECS:
        getattr(imagecodecs, codec)
    srgb_profile()


def examine(data: bytes, limits: UploadLimits) -> ImageInfo:
    """Read the upload, and return its type and size. Raises as `read`."""
    return read(data, limits).info


def read(
    data: bytes,
    limits: UploadLimits,
    *,
    keep_metadata: bool = False,
    on_size: Callable[[int, int], None] = lambda width, height: None,
) -> NormalisedImage:
    """Decode and normalise the upload.

    `on_size` is called with the width and height once the header is accepted, before any pixel is
    decoded.

    Raises ImageTooLarge (before any pixel is decoded), UnsupportedImage, BrokenImage, and
    MemoryError, whose cause may be the process as well as the picture.
    """
    check_size_bytes(len(data), limits)
    kind = sniff(data)
    try:
        samples = _READERS[kind](data, limits, on_size)
        pixels = _upright(to_srgb(samples), samples.orientation)
        first = pixels[:, :, 0]
        if all(np.array_equal(first, pixels[:, :, n]) for n in range(1, pixels.shape[2])):
            pixels = np.ascontiguousarray(first)[:, :, None]
        alpha = None
        if samples.alpha is not None:
            alpha = _upright(to_8_bits(samples.alpha), samples.orientation)
            if (alpha == 255).all():
                alpha = None
        exif = kept_exif(samples.exif) if keep_metadata else None
        return NormalisedImage(kind, pixels, alpha, exif)
    except (InvalidRequest, MemoryError):
        raise
    except Exception as error:  # decoders raise any type, such as TypeError and KeyError
        raise BrokenImage(f"the image cannot be decoded: {error}") from error


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return the pixels turned and mirrored to be upright, by EXIF's `orientation`."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in {2, 3, 6, 7}:
        pixels = pixels[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
