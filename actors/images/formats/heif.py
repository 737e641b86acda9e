"""Reads HEIC with libheif and AVIF with libavif: one still picture of 8 to 12 bits, and alpha."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pi_heif

from actors.images.formats.isobmff import Primary, primary
from actors.images.profiles import check_profile_size
from actors.images.samples import (
    Array8or16,
    Cicp,
    Colours,
    IccProfile,
    Model,
    OnSize,
    Samples,
    scaled,
    split_alpha,
    straight,
)
from restoration.errors import BrokenImage, UnsupportedImage
from restoration.images import UploadLimits, check_dimensions

_UNSPECIFIED = 2
# EXIF's orientation by the number of counter-clockwise quarter turns and the mirroring after them:
# 0 swaps top and bottom, 1 left and right.
_ORIENTATIONS = {
    (0, None): 1,
    (1, None): 8,
    (2, None): 3,
    (3, None): 6,
    (0, 0): 4,
    (1, 0): 5,
    (2, 0): 2,
    (3, 0): 7,
    (0, 1): 2,
    (1, 1): 7,
    (2, 1): 4,
    (3, 1): 5,
}


def read_heic(data: bytes, limits: UploadLimits, on_size: OnSize) -> Samples:
    """Read HEIC. EXIF's orientation is ignored: libheif has already turned and mirrored."""
    found = _checked(data, limits)
    on_size(found.width, found.height)
    file = pi_heif.open_heif(data, convert_hdr_to_8bit=False)
    image = file[file.primary_index]
    # a copy, because the decoder's memory is freed with `file`
    colours, alpha = split_alpha(np.array(image))
    if alpha is not None and image.mode.partition(";")[0].endswith("a"):  # premultiplied
        colours = straight(colours, alpha)
    return _samples(found, colours, alpha, orientation=1)


def read_avif(data: bytes, limits: UploadLimits, on_size: OnSize) -> Samples:
    found = _checked(data, limits)
    on_size(found.width, found.height)
    if found.is_cropped:
        raise UnsupportedImage(
            "AVIF with a clean aperture (clap) is not supported; crop the image and save it again"
        )
    values = imagecodecs.avif_decode(data, numthreads=1)
    if values.shape[:2] != (found.height, found.width):
        raise BrokenImage("the image cannot be decoded: its size differs from its header")
    if values.dtype == np.uint16:
        values = scaled(values, found.bits)
    colours, alpha = split_alpha(values)
    return _samples(found, colours, alpha, _ORIENTATIONS[found.turns, found.mirror])


def _checked(data: bytes, limits: UploadLimits) -> Primary:
    found = primary(data)
    check_dimensions(found.width, found.height, limits)
    if found.icc is not None:
        check_profile_size(len(found.icc))
    return found


def _samples(
    found: Primary, values: Array8or16, alpha: Array8or16 | None, orientation: int
) -> Samples:
    colours: Colours = None
    if found.icc is not None:
        colours = IccProfile(found.icc)
    elif found.nclx is not None and _UNSPECIFIED not in found.nclx[:2]:
        primaries, transfer, _, _ = found.nclx  # the decoders have applied the matrix and range
        colours = Cicp(primaries, transfer)
    model = Model.GREY if values.shape[2] == 1 else Model.RGB
    return Samples(values, model, alpha, colours, orientation, found.exif)
