"""What a file tells about its making: taken out of every result, and put back on request.

A result carries nothing that the engine wrote into it (ComfyUI: the whole graph, with paths and
prompts) and nothing of the upload (place, time, camera, owner), unless its job asks for the
upload's EXIF. Blocking, to be called off the event loop.
"""

from __future__ import annotations

import structlog
from PIL import Image
from PIL.ExifTags import IFD, Base

from actors.images.png import SIGNATURE, chunks, exif_chunk

log = structlog.get_logger(__name__)

# What the pixels mean; of the other chunks none is needed to show them (PNG, third edition, 11.3).
_PIXEL_CHUNKS = frozenset(
    (b"IHDR", b"PLTE", b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"IDAT", b"IEND")
)

_MAX_EXIF_BYTES = 65_000  # a JPEG holds 65,533
_KEPT = (
    *(Base.ImageDescription, Base.Make, Base.Model, Base.Software, Base.DateTime),
    *(Base.Artist, Base.HostComputer, Base.Copyright),
)
# true of the upload's pixels, not of the result's
_OUTDATED = (Base.ExifImageWidth, Base.ExifImageHeight, Base.ExifInteroperabilityOffset)


def exif_of(image: Image.Image) -> bytes | None:
    """The picture's EXIF, to be given to its result: as JPEG holds it, or None if there is none.

    Camera, times, place, author; without orientation (a result is upright), thumbnail, and
    whatever describes the file that it came from. EXIF that cannot be read is left out.
    """
    try:
        found = image.getexif()
        kept = Image.Exif()
        kept.update({tag: found[tag] for tag in _KEPT if tag in found})
        for ifd in (IFD.Exif, IFD.GPSInfo):
            if values := found.get_ifd(ifd):
                kept.get_ifd(ifd).update({t: v for t, v in values.items() if t not in _OUTDATED})
        data = _fitting(kept)
    except Exception:  # Pillow's parser raises anything, when fuzzed; the photo itself is fine
        log.exception("exif_left_out")
        return None
    return data


def _fitting(exif: Image.Exif) -> bytes | None:
    if not exif and not exif.get_ifd(IFD.Exif) and not exif.get_ifd(IFD.GPSInfo):
        return None
    data = exif.tobytes()
    if len(data) > _MAX_EXIF_BYTES:  # the maker's own notes are most of it
        exif.get_ifd(IFD.Exif).pop(Base.MakerNote, None)
        data = exif.tobytes()
    return data if len(data) <= _MAX_EXIF_BYTES else None


def bare_png(png: bytes, exif: bytes | None = None) -> bytes:
    """The same pixels, to the bit, with `exif` as the only metadata; nothing is decoded.

    Raises EngineFailed for what is no PNG: nobody could say what is in it.
    """
    kept = [whole for name, whole in chunks(png) if name in _PIXEL_CHUNKS]
    if exif is None and len(SIGNATURE) + sum(map(len, kept)) == len(png):
        return png
    extra = [] if exif is None else [exif_chunk(exif)]
    return b"".join([SIGNATURE, kept[0], *extra, *kept[1:]])
