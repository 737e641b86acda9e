"""Nothing of an upload's making, nor of the engine's, is in a result that did not ask for it."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import GPS, IFD, Base
from PIL.PngImagePlugin import PngInfo

from actors.images.encode import encode
from actors.images.metadata import bare_png, exif_of
from actors.images.reader import read
from restoration.errors import EngineFailed
from restoration.images import UploadLimits
from restoration.jobs import OutputFormat
from tests.pictures import ACCEPTED, HEIGHT, WIDTH, chunk, file, noise

TAKEN_AT, CAMERA, SECRET = "1986:04:26 01:23:40", "ACME 3000", b"/home/somebody/graph"
LATITUDE = (51.0, 16.0, 30.5)
EVERY_FORMAT = pytest.mark.parametrize("wanted", OutputFormat)


def camera_exif() -> Image.Exif:
    """What a telephone writes: where, when, with what, and how it was held."""
    exif = Image.Exif()
    exif[Base.Make] = CAMERA
    exif[Base.Orientation] = 6
    exif.get_ifd(IFD.Exif).update({Base.DateTimeOriginal: TAKEN_AT, Base.ExifImageWidth: WIDTH})
    exif.get_ifd(IFD.GPSInfo).update({GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: LATITUDE})
    return exif


def engines_png(picture: Image.Image | None = None) -> bytes:
    """As ComfyUI saves it when nobody told it not to: with the graph, compressed and not."""
    texts = PngInfo()
    texts.add_text("prompt", SECRET.decode())
    texts.add_text("comment", SECRET.decode())
    texts.add_text("workflow", SECRET.decode() * 20, zip=True)
    texts.add_itxt("parameters", SECRET.decode())
    return file(picture or noise(), "PNG", pnginfo=texts, exif=camera_exif().tobytes())


def opened(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def readable(data: bytes) -> bytes:
    """The file, and whatever in it is compressed."""
    found = [data]
    for start in range(len(data)):
        if data[start : start + 1] == b"\x78":
            try:
                found.append(zlib.decompressobj().decompress(data[start:]))
            except zlib.error:
                continue
    return b"".join(found)


@EVERY_FORMAT
@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "with alpha"])
def test_04_a_result_has_no_metadata_of_its_own(wanted: OutputFormat, alpha: bool) -> None:
    """Neither the graph that ComfyUI writes into its pictures nor EXIF, in any format."""
    mask = np.full((HEIGHT, WIDTH), 99, np.uint8) if alpha else None
    assert SECRET in engines_png()
    result = encode(engines_png(), wanted, 90, mask)
    assert SECRET not in readable(result)
    assert b"Exif" not in result
    image = opened(result)
    assert len(image.getexif()) == 0
    assert not {"prompt", "workflow", "parameters", "comment", "exif", "xmp"} & image.info.keys()


@EVERY_FORMAT
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_04_metadata_is_kept_on_request(wanted: OutputFormat, format: str) -> None:
    """Camera, capture time and place are the photo's; how it was held is not: it is upright."""
    photo = file(noise(), format, exif=camera_exif().tobytes())
    image = read(photo, UploadLimits(), keep_metadata=True)
    exif = opened(encode(engines_png(), wanted, 90, image.alpha, image.exif)).getexif()
    assert exif[Base.Make] == CAMERA
    assert Base.Orientation not in exif
    details = exif.get_ifd(IFD.Exif)
    assert details[Base.DateTimeOriginal] == TAKEN_AT
    assert Base.ExifImageWidth not in details  # the upload's, not the result's
    assert exif.get_ifd(IFD.GPSInfo)[GPS.GPSLatitude] == LATITUDE


def test_04_nothing_is_read_that_is_not_asked_for() -> None:
    """Without the request there is no EXIF for an encoder to write by mistake."""
    assert read(file(noise(), "JPEG", exif=camera_exif().tobytes()), UploadLimits()).exif is None


@EVERY_FORMAT
def test_04_a_photo_without_metadata_gives_none(wanted: OutputFormat) -> None:
    """Asking to keep what is not there changes nothing."""
    image = read(file(noise(), "PNG"), UploadLimits(), keep_metadata=True)
    assert image.exif is None
    assert encode(engines_png(), wanted, 90, None, None) == encode(engines_png(), wanted, 90)


def test_04_maker_notes_that_fit_no_file_are_left_out() -> None:
    """JPEG has room for 64 KiB of EXIF: the camera's private notes go first."""
    exif = camera_exif()
    exif.get_ifd(IFD.Exif)[Base.MakerNote] = b"n" * 100_000
    kept = exif_of(opened(file(noise(), "PNG", exif=exif.tobytes())))
    assert kept is not None
    assert b"nnn" not in kept
    assert CAMERA.encode() in kept
    exif[Base.ImageDescription] = "d" * 100_000
    assert exif_of(opened(file(noise(), "PNG", exif=exif.tobytes()))) is None


def test_04_structure_of_a_tiff_is_not_taken_for_metadata() -> None:
    """A TIFF's own tags describe that file; only the descriptive ones go into the result."""
    exif = Image.Exif()
    exif[Base.Artist] = "A. Nonymous"
    kept = Image.Exif()
    kept.load(exif_of(opened(file(noise(), "TIFF", exif=exif))) or b"")
    assert dict(kept) == {Base.Artist: "A. Nonymous"}


@given(st.data())
def test_04_broken_exif_is_left_out(data: st.DataObject) -> None:
    """However it was damaged, reading it raises nothing, and what it gives can be written."""
    damaged = bytearray(camera_exif().tobytes())
    places = st.tuples(st.integers(6, len(damaged) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, max_size=8)):
        damaged[place] = value
    with Image.open(io.BytesIO(file(noise(), "PNG", exif=bytes(damaged)))) as image:
        kept = exif_of(image)
    for wanted in OutputFormat:
        encode(PLAIN, wanted, 90, None, kept)


PLAIN = ACCEPTED["png"][1]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_04_pixels_are_untouched(mode: str) -> None:
    """The same mode, palette and pixels, to the bit: only chunks beside them are gone."""
    picture = noise("P") if mode == "P" else noise(mode)
    before, after = opened(engines_png(picture)), opened(bare_png(engines_png(picture)))
    assert before.mode == after.mode
    assert before.getpalette() == after.getpalette()
    assert np.array_equal(np.asarray(before), np.asarray(after))


def test_04_what_is_bare_already_is_the_same_bytes() -> None:
    """A PNG without metadata passes through, and is its own reference byte by byte."""
    assert bare_png(PLAIN) is PLAIN
    assert bare_png(engines_png()) == bare_png(bare_png(engines_png()))


def test_04_unknown_chunks_and_what_follows_the_end_are_dropped() -> None:
    """Nothing hides in a chunk that nobody knows, nor behind the picture."""
    hidden = PLAIN[:-12] + chunk(b"prVt", SECRET) + chunk(b"tIME", bytes(7)) + PLAIN[-12:] + SECRET
    assert bare_png(hidden) == PLAIN
    assert bare_png(PLAIN + SECRET) == PLAIN


@pytest.mark.parametrize("data", [b"", b"GIF89a", PLAIN[:8], PLAIN[:40], PLAIN[:-5]])
def test_04_what_is_no_whole_png_is_no_result(data: bytes) -> None:
    """Of what cannot be read, nobody could say that it carries nothing."""
    with pytest.raises(EngineFailed):
        bare_png(data)
