"""Small generated pictures in every accepted format."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image, ImageCms

from restoration.images import ImageType

WIDTH, HEIGHT = 64, 48
JPEG, PNG, WEBP, TIFF, BMP, HEIC, AVIF = ImageType


def noise(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels).convert("RGB").convert(mode)


def file(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def deep_grey(white: int = 65_535) -> Image.Image:
    """Return a 16-bit grey ramp from 0 to `white`."""
    ramp = np.linspace(0, white, WIDTH * HEIGHT).astype(np.uint16)
    return Image.fromarray(ramp.reshape(HEIGHT, WIDTH))


def sideways(orientation: int = 6) -> Image.Exif:
    """Return Exif data with an orientation; 6 exchanges width and height."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def swapped_primaries() -> bytes:
    """Return an sRGB profile whose red and green columns are exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    renamed = srgb.replace("sRGB".encode("utf-16-be"), "gRGB".encode("utf-16-be"))
    return renamed.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep_colour_png(image: Image.Image) -> bytes:
    """Encode an RGB picture as PNG with 16 bits per channel, which Pillow can read but not
    write."""
    deep = (np.asarray(image).astype(">u2") * 257).reshape(image.height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _heic(image: Image.Image) -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(image).save(out)
    return out.getvalue()


ACCEPTED: dict[str, tuple[ImageType, bytes]] = {
    "png": (PNG, file(noise(), "PNG")),
    "png with alpha": (PNG, file(noise("RGBA"), "PNG")),
    "png with a palette": (PNG, file(noise("P"), "PNG")),
    "png in grey": (PNG, file(noise("L"), "PNG")),
    "png in grey with alpha": (PNG, file(noise("LA"), "PNG")),
    "png in black and white": (PNG, file(noise("1"), "PNG")),
    "png in grey of 16 bits": (PNG, file(deep_grey(), "PNG")),
    "png in colours of 16 bits": (PNG, deep_colour_png(noise())),
    "jpeg": (JPEG, file(noise(), "JPEG")),
    "jpeg, progressive": (JPEG, file(noise(), "JPEG", progressive=True)),
    "jpeg in grey": (JPEG, file(noise("L"), "JPEG")),
    "jpeg in CMYK": (JPEG, file(noise("CMYK"), "JPEG")),
    "webp": (WEBP, file(noise(), "WEBP")),
    "webp, lossless, with alpha": (WEBP, file(noise("RGBA"), "WEBP", lossless=True)),
    "tiff": (TIFF, file(noise(), "TIFF")),
    "tiff, LZW": (TIFF, file(noise(), "TIFF", compression="tiff_lzw")),
    "tiff, deflate": (TIFF, file(noise(), "TIFF", compression="tiff_adobe_deflate")),
    "tiff, JPEG": (TIFF, file(noise(), "TIFF", compression="jpeg")),
    "tiff in CMYK": (TIFF, file(noise("CMYK"), "TIFF")),
    "tiff in grey of 16 bits": (TIFF, file(deep_grey(), "TIFF")),
    "bmp": (BMP, file(noise(), "BMP")),
    "bmp with a palette": (BMP, file(noise("P"), "BMP")),
    "heic": (HEIC, _heic(noise())),
    "heic with alpha": (HEIC, _heic(noise("RGBA"))),
    "avif": (AVIF, file(noise(), "AVIF")),
    "avif with alpha": (AVIF, file(noise("RGBA"), "AVIF")),
}
