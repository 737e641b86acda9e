"""Reads TIFF and BigTIFF: the single photo among the pages of the file.

tifffile parses the directories in Python, and imagecodecs decompresses strips and tiles. Each strip
or tile is decoded separately, and must cover its area of the picture.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from actors.images.metadata import orientation_of_tag
from actors.images.profiles import check_profile_size
from actors.images.samples import Array8or16, IccProfile, Model, OnSize, Samples, scaled, straight
from restoration.errors import BrokenImage, UnsupportedImage
from restoration.images import UploadLimits, check_dimensions

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE = 0, 1, 2, 3
_CMYK, _YCBCR, _LAB, _ICC_LAB = 5, 6, 8, 9
_CHANNELS = {
    _WHITE_IS_ZERO: 1,
    _BLACK_IS_ZERO: 1,
    _RGB: 3,
    _PALETTE: 1,
    _CMYK: 4,
    _YCBCR: 3,
    _LAB: 3,
    _ICC_LAB: 3,
}
_MODELS = {1: Model.GREY, 3: Model.RGB, 4: Model.CMYK}
_UNCOMPRESSED, _JPEG = 1, 7
# None, three of CCITT, LZW, JPEG, two numbers of deflate, PackBits, Zstandard and WebP, which
# scanners and programs write. Further decoders would only add to the attack surface.
_COMPRESSIONS = {_UNCOMPRESSED, 2, 3, 4, 5, _JPEG, 8, 32_946, 32_773, 50_000, 50_001}
_DEPTHS = {1, 2, 4, 6, 8, 10, 12, 14, 16}
_ASSOCIATED, _UNASSOCIATED = 1, 2
_REDUCED, _MASK = 1, 4
_OLD_REDUCED = 2
# A pyramid has one page for each halving. Files with several photos are refused anyway.
_MAX_PAGES = 32
_MAX_SEGMENTS = 65_536
_MAX_SAMPLES = 8
_INKS_CMYK = 1
_MORE_PHOTOS = "the file contains more than one image; send each image in its own file"


def read(data: bytes, limits: UploadLimits, on_size: OnSize) -> Samples:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = _photo(file)
        _check(page, len(data), limits)
        on_size(page.imagewidth, page.imagelength)
        planes = _decoded(page, data)
        colours = page.iccprofile
        if colours is not None:
            check_profile_size(len(colours))
        return _samples(page, planes, IccProfile(colours) if colours else None, data)


def _photo(file: tifffile.TiffFile) -> tifffile.TiffPage:
    """Return the page that is not a thumbnail, a pyramid level or a mask.

    Raises UnsupportedImage if there are several.
    """
    pages = list(_pages(file))
    photos = [page for page in pages if not _is_reduced(page)]
    if not photos:  # cameras store the photo as a sub-directory of its thumbnail
        below = [sub for page in pages for sub in _below(page)]
        photos = [page for page in below if not _is_reduced(page)] or pages[:1]
    if len(photos) > 1:
        raise UnsupportedImage(_MORE_PHOTOS)
    return photos[0]


def _pages(file: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    seen = set[int]()
    for n in range(_MAX_PAGES + 1):
        try:
            page = file.pages[n]
        except IndexError:
            return
        if not isinstance(page, tifffile.TiffPage) or page.offset in seen:
            return
        if n == _MAX_PAGES:
            raise UnsupportedImage(_MORE_PHOTOS)
        seen.add(page.offset)
        yield page


def _below(page: tifffile.TiffPage) -> Iterator[tifffile.TiffPage]:
    if not page.subifds:
        return
    if len(page.subifds) > _MAX_PAGES:
        raise UnsupportedImage(_MORE_PHOTOS)
    for sub in page.pages or ():
        if isinstance(sub, tifffile.TiffPage):
            yield sub


def _is_reduced(page: tifffile.TiffPage) -> bool:
    kind = int(page.tags.valueof(254, 0))
    return bool(kind & (_REDUCED | _MASK)) or page.tags.valueof(255) == _OLD_REDUCED


def _check(page: tifffile.TiffPage, size_bytes: int, limits: UploadLimits) -> None:
    """Check the page's directory before anything is decoded."""
    if page.imagewidth <= 0 or page.imagelength <= 0:
        raise BrokenImage("the image cannot be decoded: its directory has no size")
    check_dimensions(page.imagewidth, page.imagelength, limits)
    if page.is_tiled:  # a whole tile is decoded, even if the picture is smaller
        check_dimensions(page.tilewidth, page.tilelength, limits)
    bits, channels = page.bitspersample, _CHANNELS.get(page.photometric)
    if page.compression not in _COMPRESSIONS:
        raise UnsupportedImage(f"TIFF with compression {int(page.compression)} is not supported")
    if channels is None or (page.photometric == _CMYK and page.tags.valueof(332, 1) != _INKS_CMYK):
        raise UnsupportedImage(
            f"TIFF with photometric interpretation {int(page.photometric)} is not "
            "supported; send a greyscale, RGB, CMYK or CIELab image"
        )
    if page.sampleformat != 1 or bits not in _DEPTHS:
        raise UnsupportedImage(
            "the image has samples that are not integers of 1 to 16 bits, so black and "
            "white are undefined; send an image of 8 or 16 bits"
        )
    if not channels <= page.samplesperpixel <= _MAX_SAMPLES or page.imagedepth != 1:
        raise UnsupportedImage(
            f"TIFF with {page.samplesperpixel} samples per pixel is not supported"
        )
    if page.is_subsampled and page.compression != _JPEG and page.planarconfig == 2:
        raise UnsupportedImage("TIFF with subsampled YCbCr in separate planes is not supported")
    if page.photometric in {_YCBCR, _LAB, _ICC_LAB} and bits not in {8, 16}:
        raise UnsupportedImage(
            f"TIFF with {bits} bits per sample is not supported for this colour space"
        )
    places, sizes = page.dataoffsets, page.databytecounts
    if not len(places) == len(sizes) == math.prod(page.chunked) or not places:
        raise BrokenImage("the image cannot be decoded: its strips or tiles do not match its size")
    if len(places) > _MAX_SEGMENTS:
        raise UnsupportedImage(
            f"TIFF with more than {_MAX_SEGMENTS} strips or tiles is not supported"
        )
    if any(
        not size or place + size > size_bytes for place, size in zip(places, sizes, strict=True)
    ):
        raise BrokenImage("the image cannot be decoded: a part of the file is missing")


def _decoded(page: tifffile.TiffPage, data: bytes) -> NDArray[Any]:
    """Return all samples as stored, of shape (height, width, samples)."""
    height, width, count = page.imagelength, page.imagewidth, page.samplesperpixel
    planar = page.planarconfig == 2 and count > 1
    result = np.zeros((height, width, count), page.dtype)
    tables = page.jpegtables
    subsampled = page.is_subsampled and page.compression != _JPEG
    for n, (place, size) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        segment = data[place : place + size]
        part: NDArray[Any] | None
        if subsampled:
            part, plane, top, left = _subsampled(page, segment, n)
        else:
            part, (plane, _, top, left, _), _ = page.decode(segment, n, jpegtables=tables)
            if part is None:
                raise BrokenImage("the image cannot be decoded: a part of the file is missing")
            part = part[0]
        rows = min(page.tilelength if page.is_tiled else page.rowsperstrip, height - top)
        across = min(page.tilewidth if page.is_tiled else width, width - left)
        expected = 1 if planar else count
        if part.shape[0] < rows or part.shape[1] < across or part.shape[2] != expected:
            raise BrokenImage("the image cannot be decoded: a part of the file is missing")
        channels = slice(plane, plane + 1) if planar else slice(None)
        result[top : top + rows, left : left + across, channels] = part[:rows, :across]
    return result


def _subsampled(
    page: tifffile.TiffPage, segment: bytes, number: int
) -> tuple[NDArray[np.uint8], int, int, int]:
    """Return the samples of a strip or tile of subsampled YCbCr, and its plane, top and left.

    It is stored in units of several Y samples that share one Cb and Cr (TIFF 6.0, section 21).
    """
    across, down = page.subsampling or (1, 1)
    wide = page.tilewidth if page.is_tiled else page.imagewidth
    high = page.tilelength if page.is_tiled else page.rowsperstrip
    each = math.ceil(page.imagewidth / wide)
    top, left = number // each * high, number % each * wide
    if not page.is_tiled:
        high = min(high, page.imagelength - top)
    units, rows = math.ceil(wide / across), math.ceil(high / down)
    size = units * rows * (across * down + 2)
    if page.compression != _UNCOMPRESSED:
        segment = tifffile.TIFF.DECOMPRESSORS[page.compression](segment, out=size)
    if len(segment) < size or page.predictor != 1:
        raise BrokenImage("the image cannot be decoded: a part of the file is missing")
    stored = np.frombuffer(segment, np.uint8, size).reshape(rows, units, across * down + 2)
    luma = stored[..., :-2].reshape(rows, units, down, across).swapaxes(1, 2)
    chroma = stored[..., -2:].repeat(down, axis=0).repeat(across, axis=1)
    y = luma.reshape(rows * down, units * across, 1)
    return np.concatenate([y, chroma], axis=2)[:high, :wide], 0, top, left


def _samples(
    page: tifffile.TiffPage, stored: NDArray[Any], colours: IccProfile | None, data: bytes
) -> Samples:
    channels, bits = _CHANNELS[page.photometric], page.bitspersample
    if stored.dtype == np.bool_:
        stored = stored.astype(np.uint8)
    if page.photometric == _PALETTE:
        values, model = _of_palette(page, stored[:, :, 0]), Model.RGB
    elif page.photometric in {_LAB, _ICC_LAB}:
        values, model = stored[:, :, :3], Model.LAB
        if page.photometric == _ICC_LAB:  # a* and b* unsigned, with an offset of half the range
            values = values.copy()
            values[..., 1:] ^= np.array(1 << (8 * values.itemsize - 1), values.dtype)
    else:
        values, model = stored[:, :, :channels], _MODELS[channels]
        if bits not in {8, 16}:
            values = scaled(values, bits)
        if page.photometric == _WHITE_IS_ZERO:
            values = np.iinfo(values.dtype).max - values
        if page.photometric == _YCBCR and page.compression != _JPEG:
            values = _rgb_of_ycbcr(values)
    alpha, associated = _alpha(page, stored[:, :, channels:])
    if model is Model.CMYK:
        alpha = None  # a mask for printing, not transparency
    if alpha is not None:
        if bits not in {8, 16}:
            alpha = scaled(alpha, bits)
        if alpha.itemsize != values.itemsize:
            alpha = alpha.astype(np.uint16) * np.uint16(257)
        if associated:
            values = straight(values, alpha)
    exif = data if page.tags else None
    return Samples(values, model, alpha, colours, orientation_of_tag(page.tags.valueof(274)), exif)


def _alpha(page: tifffile.TiffPage, extra: NDArray[Any]) -> tuple[Array8or16 | None, bool]:
    """Return the first extra sample that is alpha, and whether colours are premultiplied by it."""
    for n, kind in enumerate(page.extrasamples[: extra.shape[2]]):
        if kind in {_ASSOCIATED, _UNASSOCIATED}:
            return extra[:, :, n], kind == _ASSOCIATED
    return None, False


def _of_palette(page: tifffile.TiffPage, indices: NDArray[Any]) -> Array8or16:
    colours = page.colormap
    if colours is None or colours.shape != (3, 2**page.bitspersample):
        raise BrokenImage("the image cannot be decoded: its palette is missing")
    if colours.max() < 256:  # some programs write entries of 8 instead of 16 bits
        colours = colours.astype(np.uint8)
    found: Array8or16 = colours.T[indices]
    return found


def _rgb_of_ycbcr(values: Array8or16) -> Array8or16:
    """Convert full range YCbCr with BT.601's coefficients (TIFF 6.0, section 21)."""
    top = np.iinfo(values.dtype).max
    y, cb, cr = (np.asarray(values[..., n], np.float32) for n in range(3))
    cb, cr = cb - (top + 1) / 2, cr - (top + 1) / 2
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    whole: Array8or16 = np.clip(np.round(rgb), 0, top).astype(values.dtype)
    return whole
