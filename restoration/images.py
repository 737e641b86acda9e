"""What an upload may be: its type by content, its size in bytes, its size in pixels. Pure."""

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


_SIGNATURES: tuple[tuple[bytes, ImageType], ...] = (
    (b"\xff\xd8\xff", ImageType.JPEG),
    (b"\x89PNG\r\n\x1a\n", ImageType.PNG),
    (b"II*\x00", ImageType.TIFF),
    (b"MM\x00*", ImageType.TIFF),
    (b"BM", ImageType.BMP),
)


# What the formats themselves can hold; PNG has no limit that matters here.
_MAX_RESULT_SIDE = {OutputFormat.WEBP: 16_383, OutputFormat.JPEG: 65_500}


@dataclass(frozen=True, slots=True)
class UploadLimits:
    max_bytes: int = 50 * MEBIBYTE
    max_pixels: int = 16_000_000
    max_side: int = 16_384
    # Below what Pillow reads back without taking it for a decompression bomb (179 million).
    max_result_pixels: int = 100_000_000


def sniff(data: bytes) -> ImageType:
    """The type that the first bytes say, whatever a file name or header claims.

    Raises InvalidRequest for no bytes, UnsupportedImage for anything else that is not accepted.
    """
    if not data:
        raise InvalidRequest("the image is empty; send the bytes of a picture")
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ImageType.WEBP
    raise UnsupportedImage(
        "the file is not a picture of an accepted type; send JPEG, PNG, WebP, TIFF or BMP",
        accepted=[kind.value for kind in ImageType],
    )


def check_size_bytes(size_bytes: int, limits: UploadLimits) -> None:
    """Raise ImageTooLarge above `limits.max_bytes`."""
    if size_bytes > limits.max_bytes:
        raise ImageTooLarge(
            f"the image is larger than {limits.max_bytes} bytes "
            f"({limits.max_bytes / MEBIBYTE:.0f} MiB); send a smaller file",
            max_bytes=limits.max_bytes,
        )


def check_dimensions(width: int, height: int, limits: UploadLimits) -> None:
    """Raise ImageTooLarge above the pixel or side limit; to be called before decoding."""
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the image has {width}x{height} pixels; at most {limits.max_pixels} are accepted",
            width=width,
            height=height,
            max_pixels=limits.max_pixels,
        )
    if max(width, height) > limits.max_side:
        raise ImageTooLarge(
            f"the image is {width}x{height}; no side may be longer than {limits.max_side} pixels",
            width=width,
            height=height,
            max_side=limits.max_side,
        )


def check_result(
    width: int, height: int, scale: float, output_format: OutputFormat, limits: UploadLimits
) -> None:
    """Raise ImageTooLarge when a width x height picture, `scale` times as large, is too large."""
    wide, high = math.ceil(width * scale), math.ceil(height * scale)
    if wide * high > limits.max_result_pixels:
        raise ImageTooLarge(
            f"the result would have {wide}x{high} pixels; at most {limits.max_result_pixels} "
            "are made: choose a smaller scale",
            max_result_pixels=limits.max_result_pixels,
        )
    max_side = _MAX_RESULT_SIDE.get(output_format)
    if max_side is not None and max(wide, high) > max_side:
        raise ImageTooLarge(
            f"the result would be {wide}x{high}, and no side of a {output_format} can be longer "
            f"than {max_side}: choose png or a smaller scale",
            max_side=max_side,
        )
