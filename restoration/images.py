"""Checks of an upload's type, by content, and of its size in bytes and pixels. No I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from restoration.errors import ImageTooLarge, InvalidRequest, UnsupportedImage
from restoration.jobs import OutputFormat

MEBIBYTE = 1024 * 1024


class ImageType(StrEnum):
    """The accepted types; the value is the MIME type."""

    JPEG = "image/jpeg"
    PNG = "image/png"
    WEBP = "image/webp"
    TIFF = "image/tiff"
    BMP = "image/bmp"
    HEIC = "image/heic"
    AVIF = "image/avif"


_SIGNATURES: tuple[tuple[bytes, ImageType], ...] = (
    (b"\xff\xd8\xff", ImageType.JPEG),
    (b"\x89PNG\r\n\x1a\n", ImageType.PNG),
    (b"II*\x00", ImageType.TIFF),
    (b"MM\x00*", ImageType.TIFF),
    (b"II+\x00", ImageType.TIFF),  # BigTIFF
    (b"MM\x00+", ImageType.TIFF),
    (b"BM", ImageType.BMP),
)

# ISO/IEC 23008-12, annex B, and the AVIF specification, section 6
_BRANDS = {ImageType.HEIC: {b"heic", b"heix", b"heim", b"heis"}, ImageType.AVIF: {b"avif"}}
_GENERAL_BRANDS = {b"mif1", b"mif2", b"miaf", b"MiHB", b"MiHA", b"MiHE"}
_SEQUENCE_BRANDS = {b"hevc", b"hevx", b"hevm", b"hevs", b"msf1", b"avis"}
_MAX_BRANDS_BYTES = 256

ACCEPTED_TYPES = "JPEG, PNG, WebP, TIFF, BMP, HEIC or AVIF"

# Longest side that each format can store; PNG's limit is far above what is accepted.
_MAX_RESULT_SIDE = {OutputFormat.WEBP: 16_383, OutputFormat.JPEG: 65_500}


@dataclass(frozen=True, slots=True)
class UploadLimits:
    max_bytes: int = 50 * MEBIBYTE
    max_pixels: int = 16_000_000
    max_side: int = 16_384
    # Below the 179 million pixels from which Pillow refuses a file as a decompression bomb.
    max_result_pixels: int = 100_000_000


def sniff(data: bytes) -> ImageType:
    """Return the image type by its first bytes; file names and headers are not considered.

    Raises InvalidRequest if `data` is empty and UnsupportedImage for any type not accepted.
    """
    if not data:
        raise InvalidRequest("the image is empty; send the bytes of an image file")
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ImageType.WEBP
    if data[4:8] == b"ftyp" and (found := _type_of_brands(data)) is not None:
        return found
    raise UnsupportedImage(
        f"the file is not an image of a supported type; send {ACCEPTED_TYPES}",
        accepted=[kind.value for kind in ImageType],
    )


def _type_of_brands(data: bytes) -> ImageType | None:
    """Return HEIC or AVIF by the brands of an ISO base media file, or None for videos and others.

    Raises UnsupportedImage for a sequence of pictures.
    """
    size = min(int.from_bytes(data[:4]), _MAX_BRANDS_BYTES)
    brands = [data[8:12], *(data[n : n + 4] for n in range(16, size, 4))]
    if brands[0] in _SEQUENCE_BRANDS:
        raise UnsupportedImage("the file contains an image sequence; send a single image")
    # Some cameras write a general brand first; the codec is then among the other brands.
    considered = brands if brands[0] in _GENERAL_BRANDS else brands[:1]
    for kind, names in _BRANDS.items():
        if any(brand in names for brand in considered):
            return kind
    return None


def check_size_bytes(size_bytes: int, limits: UploadLimits) -> None:
    """Raise ImageTooLarge above `limits.max_bytes`."""
    if size_bytes > limits.max_bytes:
        raise ImageTooLarge(
            f"the image is larger than {limits.max_bytes} bytes "
            f"({limits.max_bytes / MEBIBYTE:.0f} MiB); send a smaller file",
            max_bytes=limits.max_bytes,
        )


def check_dimensions(width: int, height: int, limits: UploadLimits) -> None:
    """Raise ImageTooLarge above the pixel or side limit. Call it before decoding."""
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the image has {width}x{height} pixels; the maximum is {limits.max_pixels} "
            "pixels in total",
            width=width,
            height=height,
            max_pixels=limits.max_pixels,
        )
    if max(width, height) > limits.max_side:
        raise ImageTooLarge(
            f"the image has {width}x{height} pixels; the maximum is {limits.max_side} "
            "pixels on a side",
            width=width,
            height=height,
            max_side=limits.max_side,
        )


def check_result(
    width: int, height: int, scale: float, output_format: OutputFormat, limits: UploadLimits
) -> None:
    """Raise ImageTooLarge if a `width` x `height` picture scaled by `scale` exceeds a limit.

    The limits are `max_result_pixels` and the longest side of `output_format`.
    """
    wide, high = math.ceil(width * scale), math.ceil(height * scale)
    if wide * high > limits.max_result_pixels:
        raise ImageTooLarge(
            f"the result would have {wide}x{high} pixels; the maximum is "
            f"{limits.max_result_pixels} pixels in total: choose a smaller scale",
            max_result_pixels=limits.max_result_pixels,
        )
    max_side = _MAX_RESULT_SIDE.get(output_format)
    if max_side is not None and max(wide, high) > max_side:
        raise ImageTooLarge(
            f"the result would have {wide}x{high} pixels; the maximum for {output_format} "
            f"is {max_side} pixels on a side: choose png or a smaller scale",
            max_side=max_side,
        )
