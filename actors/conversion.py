"""What goes into the engine, and what comes out of it, as a person expects to see it.

ComfyUI sees eight bits of RGB: it drops transparency, ignores colour profiles and cuts deep greys
off. What it would get wrong is converted before, and transparency is put back afterwards, unless
pixels are moved about meanwhile: such a picture goes in on white. Any other picture goes in as it
came, to the byte. Blocking, to be called off the event loop.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from actors.metadata import bare_png, exif_of
from actors.pictures import DECODERS
from actors.png import png_of
from restoration.engine import EngineResult, Pixels
from restoration.images import ImageType, sniff
from restoration.jobs import OutputFormat

_PNG = OutputFormat.PNG


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture for the engine. `alpha` is kept aside, upright; None when all is opaque.

    So is `exif`, for the result, if it is to have the upload's.
    """

    data: bytes
    type: ImageType
    pixels: int
    alpha: Image.Image | None = None
    exif: bytes | None = None


def prepare(data: bytes, *, keep_metadata: bool = False, on_white: bool = False) -> Prepared:
    """An examined upload in a form that ComfyUI's LoadImage reads right.

    `on_white`: what is transparent shows white, in place of an alpha that is kept aside.
    """
    with Image.open(io.BytesIO(data), formats=list(DECODERS.values())) as image:
        exif = exif_of(image) if keep_metadata else None
        upright = ImageOps.exif_transpose(image)
    pixels = upright.width * upright.height
    alpha, profile = _alpha(upright), _profile(upright)
    if _is_deep_grey(upright):
        plain = _shallow(upright)
    elif alpha is not None or profile is not None:
        plain = _in_srgb(upright, profile)
    else:
        return Prepared(data, sniff(data), pixels, exif=exif)
    if on_white and alpha is not None:
        white = Image.new("RGB", plain.size, "white")
        plain, alpha = Image.composite(plain.convert("RGB"), white, alpha), None
    return Prepared(png_of(plain), ImageType.PNG, pixels, alpha, exif)


def encode(
    picture: EngineResult,
    output_format: OutputFormat,
    quality: int,
    alpha: Image.Image | None = None,
    exif: bytes | None = None,
) -> bytes:
    """The engine's picture in the format asked for, with `exif` and no other metadata.

    Without `alpha` the pixels of a PNG that is to be one are not even decoded. `quality` (1 to 100)
    is for JPEG and WebP. JPEG has no transparency: it shows white instead.
    """
    if output_format is _PNG and alpha is None:
        if isinstance(picture, bytes):
            return bare_png(picture, exif)
        return png_of(_rows(picture), exif)
    with _opened(picture) as image:
        image.load()
        # a copy of 100 megapixels takes 400 MB
        result = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is not None:
        result.putalpha(alpha.resize(result.size, Image.Resampling.LANCZOS))
    if output_format is _PNG:
        return png_of(result, exif)
    result.info.clear()  # Pillow makes a PNG's texts the comment of a JPEG
    if alpha is not None and output_format is OutputFormat.JPEG:
        white = Image.new("RGBA", result.size, "white")
        result = Image.alpha_composite(white, result).convert("RGB")
    out = io.BytesIO()
    options = {"quality": quality, "exif": exif or b"", "icc_profile": None}
    result.save(out, output_format.value, **options)
    return out.getvalue()


def _opened(picture: EngineResult) -> Image.Image:
    if isinstance(picture, bytes):
        return Image.open(io.BytesIO(picture), formats=["PNG"])
    rows = _rows(picture)
    return Image.fromarray(rows[:, :, 0] if picture.channels == 1 else rows)


def _rows(picture: Pixels) -> NDArray[np.uint8]:
    """(height, width, channels), read when they are looked at."""
    shape = (picture.height, picture.width, picture.channels)
    return np.memmap(picture.path, np.uint8, "r", shape=shape)


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16")


def _shallow(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


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
