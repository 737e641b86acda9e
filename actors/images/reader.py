"""Reads an upload once: checked, upright, in sRGB with 8 bits a channel, its alpha apart.

What `examine` accepts, `read` returns. Both block, and belong in a process that may be killed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    Image,
    ImageCms,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from actors.images.metadata import exif_of
from restoration.errors import BrokenImage, ImageTooLarge, InvalidRequest, UnsupportedImage
from restoration.images import ImageType, UploadLimits, check_dimensions, check_size_bytes, sniff

# Pillow is told which decoder to use, so that no other of its many parsers sees an upload. It
# loads all of them when it is asked for one that is not there; so these are imported.
_DECODERS = {
    ImageType.JPEG: JpegImagePlugin.JpegImageFile.format,
    ImageType.PNG: PngImagePlugin.PngImageFile.format,
    ImageType.WEBP: WebPImagePlugin.WebPImageFile.format,
    ImageType.TIFF: TiffImagePlugin.TiffImageFile.format,
    ImageType.BMP: BmpImagePlugin.BmpImageFile.format,
}
_32_BITS = {"I", "F"}


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An upload that was decoded to its last pixel; `width` and `height` in pixels, upright."""

    type: ImageType
    width: int
    height: int


@dataclass(frozen=True, slots=True, eq=False)
class NormalisedImage:
    """A picture as a person sees it: upright, in sRGB, with 8 bits a channel.

    `pixels` has the shape (height, width, channels) with 3 channels, or 1 with the tone curve of
    sRGB when the picture is grey everywhere. `alpha` has the shape (height, width), None when all
    is opaque. `exif` is the metadata for the result, if it was asked for and there is any.
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


def examine(data: bytes, limits: UploadLimits) -> ImageInfo:
    """Read the upload, and return what it is. Raises as `read`."""
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
    MemoryError, which says as much about the process as about the picture.
    """
    check_size_bytes(len(data), limits)
    kind = sniff(data)
    try:
        with Image.open(io.BytesIO(data), formats=[_DECODERS[kind]]) as image:
            _check_header(image, kind, limits)
            on_size(image.width, image.height)
            image.load()
            exif = exif_of(image) if keep_metadata else None
            return _normalised(kind, ImageOps.exif_transpose(image), exif)
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
    # further pictures are previews that cameras add (MPO); the photo is the first.
    if kind is not ImageType.JPEG and getattr(image, "is_animated", False):
        raise UnsupportedImage(
            "the file holds more than one picture; send each as a file of its own"
        )
    if image.mode in _32_BITS:
        raise UnsupportedImage(
            "the picture has samples of 32 bits, for which black and white are not defined; "
            "send 8 or 16 bits"
        )


def _normalised(kind: ImageType, upright: Image.Image, exif: bytes | None) -> NormalisedImage:
    alpha, profile = _alpha(upright), _profile(upright)
    if upright.mode.startswith("I;16"):
        pixels = (np.asarray(upright) >> 8).astype(np.uint8)
    else:
        pixels = np.asarray(_in_srgb(upright, profile))
    pixels = pixels.reshape(upright.height, upright.width, -1)
    return NormalisedImage(kind, _without_equal_channels(pixels), alpha, exif)


def _without_equal_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    first = pixels[:, :, :1]
    return first if all(np.array_equal(first, pixels[:, :, n : n + 1]) for n in (1, 2)) else pixels


def _alpha(image: Image.Image) -> NDArray[np.uint8] | None:
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else np.asarray(alpha)


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The picture's colour profile, if it has one that can be used and that is not sRGB."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        return None if "sRGB" in ImageCms.getProfileDescription(profile) else profile
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # a broken profile says nothing about the colours


def _in_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    plain = image if image.mode in {"L", "RGB", "CMYK"} else image.convert("RGB")
    if profile is not None:
        srgb = ImageCms.createProfile("sRGB")
        with suppress(ImageCms.PyCMSError):  # a profile for another kind of picture than this
            converted = ImageCms.profileToProfile(plain, profile, srgb, outputMode="RGB")
            if converted is not None:
                return converted
    return plain.convert("RGB")
