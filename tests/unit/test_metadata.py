"""Results carry no metadata of the upload or the engine unless requested."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import GPS, IFD, Base
from PIL.PngImagePlugin import PngInfo

from actors.images.encode import encode
from actors.images.metadata import bare_png, kept_exif, orientation_of
from actors.images.reader import read
from restoration.errors import EngineFailed
from restoration.images import UploadLimits
from restoration.jobs import OutputFormat
from tests.support.pictures import ACCEPTED, HEIGHT, WIDTH, chunk, file, noise

TAKEN_AT, CAMERA, SECRET = "1986:04:26 01:23:40", "ACME 3000", b"/home/somebody/graph"
LATITUDE = (51.0, 16.0, 30.5)
EVERY_FORMAT = pytest.mark.parametrize("wanted", OutputFormat)


def camera_exif() -> Image.Exif:
    """Return a telephone's EXIF: place, time, device and orientation."""
    exif = Image.Exif()
    exif[Base.Make] = CAMERA
    exif[Base.Orientation] = 6
    exif.get_ifd(IFD.Exif).update({Base.DateTimeOriginal: TAKEN_AT, Base.ExifImageWidth: WIDTH})
    exif.get_ifd(IFD.GPSInfo).update({GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: LATITUDE})
    return exif


def engines_png(picture: Image.Image | None = None) -> bytes:
    """Return a PNG as ComfyUI saves it by default: with the graph, compressed and not."""
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
    """Return the file with its compressed parts expanded."""
    found = [data]
    for start in range(len(data)):
        if data[start : start + 1] == b"\x78":
            try:
                found.append(zlib.decompressobj().decompress(data[start:]))
            except zlib.error:
                continue
    return b"".join(found)


@pytest.mark.images
@EVERY_FORMAT
@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "with alpha"])
def test_a_result_has_no_metadata_of_its_own(wanted: OutputFormat, alpha: bool) -> None:
    """Neither the graph that ComfyUI writes into its pictures nor EXIF remains, in any format."""
    mask = np.full((HEIGHT, WIDTH), 99, np.uint8) if alpha else None
    assert SECRET in engines_png()
    result = encode(engines_png(), wanted, 90, mask)
    assert SECRET not in readable(result)
    assert b"Exif" not in result
    image = opened(result)
    assert len(image.getexif()) == 0
    assert not {"prompt", "workflow", "parameters", "comment", "exif", "xmp"} & image.info.keys()


@pytest.mark.images
@EVERY_FORMAT
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_metadata_is_kept_on_request(wanted: OutputFormat, format: str) -> None:
    """Camera, capture time and place are the photo's; orientation is not: the result is upright."""
    photo = file(noise(), format, exif=camera_exif().tobytes())
    image = read(photo, UploadLimits(), keep_metadata=True)
    exif = opened(encode(engines_png(), wanted, 90, image.alpha, image.exif)).getexif()
    assert exif[Base.Make] == CAMERA
    assert Base.Orientation not in exif
    details = exif.get_ifd(IFD.Exif)
    assert details[Base.DateTimeOriginal] == TAKEN_AT
    assert Base.ExifImageWidth not in details  # the upload's, not the result's
    assert exif.get_ifd(IFD.GPSInfo)[GPS.GPSLatitude] == LATITUDE


@pytest.mark.images
def test_nothing_is_read_that_is_not_asked_for() -> None:
    """Without the request there is no EXIF that an encoder could write by mistake."""
    assert read(file(noise(), "JPEG", exif=camera_exif().tobytes()), UploadLimits()).exif is None


@pytest.mark.images
@EVERY_FORMAT
def test_a_photo_without_metadata_gives_none(wanted: OutputFormat) -> None:
    """A request to keep absent metadata changes nothing."""
    image = read(file(noise(), "PNG"), UploadLimits(), keep_metadata=True)
    assert image.exif is None
    assert encode(engines_png(), wanted, 90, None, None) == encode(engines_png(), wanted, 90)


def test_maker_notes_that_fit_no_file_are_left_out() -> None:
    """JPEG has room for 64 KiB of EXIF: only values that do not fit it are left out."""
    exif = camera_exif()
    exif.get_ifd(IFD.Exif)[Base.MakerNote] = b"n" * 100_000
    exif[Base.ImageDescription] = "d" * 100_000
    kept = kept_exif(exif.tobytes())
    assert kept is not None
    assert b"nnn" not in kept
    assert b"ddd" not in kept
    assert CAMERA.encode() in kept


def test_maker_notes_go_before_other_values() -> None:
    """This applies where each value fits alone but not all together."""
    exif = camera_exif()
    exif.get_ifd(IFD.Exif)[Base.MakerNote] = b"n" * 60_000
    exif.get_ifd(IFD.Exif)[Base.UserComment] = b"c" * 30_000
    kept = kept_exif(exif.tobytes())
    assert kept is not None
    assert b"nnn" not in kept
    assert b"c" * 30_000 in kept


def test_structure_of_a_tiff_is_not_taken_for_metadata() -> None:
    """A TIFF's own tags describe that file; only the descriptive ones go into the result."""
    exif = Image.Exif()
    exif[Base.Artist] = "A. Nonymous"
    kept = Image.Exif()
    image = read(file(noise(), "TIFF", exif=exif), UploadLimits(), keep_metadata=True)
    kept.load(image.exif or b"")
    assert dict(kept) == {Base.Artist: "A. Nonymous"}


ARTIST = "Jörg Müller".encode()
TITLE = "Großmutter, 写真".encode("utf-16-le") + bytes(2)


def raw_exif(order: str) -> bytes:
    """Return EXIF with non-ASCII texts, a GPS position, an orientation and a thumbnail."""
    place, position = 8 + 2 + 6 * 12 + 4, struct.pack(f"{order}6I", 51, 1, 16, 1, 61, 2)
    entries, values = [], b""
    main = {
        0x010E: (2, b"Omas K\xfcche\0"),  # Latin-1, as old cameras write
        0x0112: (3, struct.pack(f"{order}H", 6)),
        0x013B: (2, ARTIST + b"\0"),
        0x8298: (2, b"\xc2\xa9 J\xc3\xb6rg\0"),
        0x9C9B: (1, TITLE),
    }
    for tag, (kind, value) in main.items():
        count = 1 if kind == 3 else len(value)
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field = struct.pack(f"{order}I", place + len(values))
            values += value + bytes(len(value) % 2)
        entries.append(struct.pack(f"{order}HHI", tag, kind, count) + field)
    gps = place + len(values)
    entries.insert(4, struct.pack(f"{order}HHII", 0x8825, 4, 1, gps))
    below = struct.pack(f"{order}HHHII", 1, 2, 5, 3, gps + 18) + bytes(4) + position
    thumbnail = struct.pack(f"{order}HHHII", 1, 0x0201, 4, 1, 8) + bytes(4)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    table = struct.pack(f"{order}H", len(entries)) + b"".join(entries)
    following = struct.pack(f"{order}I", gps + len(below))
    return head + table + following + values + below + thumbnail


def stored_exif(data: bytes) -> bytes:
    """Return the EXIF as the file holds it, beginning with II or MM."""
    found: bytes = opened(data).info["exif"]
    return found.removeprefix(b"Exif\0\0")


def values_of(exif: bytes) -> dict[int, bytes]:
    """Return the bytes of each value in the first directory, and of a GPS latitude."""
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    found: dict[int, bytes] = {}
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8}
    places = [struct.unpack_from(f"{order}I", exif, 4)[0]]
    while places:
        place = places.pop()
        for n in range(struct.unpack_from(f"{order}H", exif, place)[0]):
            entry = place + 2 + 12 * n
            tag, kind, count, value = struct.unpack_from(f"{order}HHII", exif, entry)
            size = sizes[kind] * count
            if tag == 0x8825:
                places.append(value)
                continue
            found[tag] = exif[value : value + size] if size > 4 else exif[entry + 8 :][:size]
    return found


@EVERY_FORMAT
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP", "HEIC", "AVIF", "TIFF"])
def test_texts_come_back_byte_for_byte(wanted: OutputFormat, order: str, source: str) -> None:
    """Texts keep their encoding: UTF-8, Latin-1 or UTF-16, in either byte order."""
    exif = raw_exif(order)
    if source == "AVIF":  # Pillow rewrites EXIF that has an orientation
        orientation, other = (struct.pack(f"{order}HH", tag, 3) for tag in (0x0112, 0x0111))
        exif = exif.replace(orientation, other)
    with_prefix = b"Exif\0\0" + exif
    if source == "HEIC":
        out = io.BytesIO()
        pillow_heif.from_pillow(noise()).save(out, exif=with_prefix)
        photo = out.getvalue()
    elif source == "TIFF":
        photo = tiff_with(exif)
    else:
        photo = file(noise(), source, exif=with_prefix)
    image = read(photo, UploadLimits(), keep_metadata=True)
    result = encode(engines_png(), wanted, 90, image.alpha, image.exif)
    found = values_of(stored_exif(result))
    kept = {
        tag: value for tag, value in values_of(exif).items() if tag not in {0x0111, 0x0112, 0x0201}
    }
    assert found == kept
    assert found[0x013B] == ARTIST + b"\0"
    assert found[0x9C9B] == TITLE


def tiff_with(exif: bytes) -> bytes:
    """Return a TIFF of one grey pixel whose first directory also has the values of `exif`."""
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    (count,) = struct.unpack_from(f"{order}H", exif, 8)
    entries = [exif[10 + 12 * n : 22 + 12 * n] for n in range(count)]
    shape = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 1}
    entries += [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in shape.items()]
    entries.sort(key=lambda entry: struct.unpack_from(f"{order}H", entry))
    table = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return exif[:4] + struct.pack(f"{order}I", len(exif)) + exif[8:] + table


def test_orientation_is_read_in_either_byte_order() -> None:
    assert orientation_of(raw_exif("<")) == orientation_of(b"Exif\0\0" + raw_exif(">")) == 6


@given(st.data())
def test_broken_exif_is_left_out(data: st.DataObject) -> None:
    """Reading damaged EXIF never raises, and its output can be written."""
    damaged = bytearray(data.draw(st.sampled_from([camera_exif().tobytes(), raw_exif("<")])))
    places = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, max_size=8)):
        damaged[place] = value
    kept = kept_exif(bytes(damaged))
    assert 1 <= orientation_of(bytes(damaged)) <= 8
    for wanted in OutputFormat:
        encode(PLAIN, wanted, 90, None, kept)


def test_entries_that_share_their_bytes_make_no_large_exif() -> None:
    """A directory may reference the same bytes thousands of times."""
    entries = b"".join(struct.pack("<HHII", tag, 7, 50_000, 0) for tag in range(60_000))
    directory = struct.pack("<H", 60_000) + entries + bytes(4)
    main = struct.pack("<HHHII", 1, 0x8769, 4, 1, 26) + bytes(4)
    kept = kept_exif(b"II*\0" + struct.pack("<I", 8) + main + directory)
    assert kept is None or len(kept) <= 65_533


PLAIN = ACCEPTED["png"][1]


@pytest.mark.images
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_pixels_are_untouched(mode: str) -> None:
    """Mode, palette and pixels are identical: only other chunks are removed."""
    picture = noise("P") if mode == "P" else noise(mode)
    before, after = opened(engines_png(picture)), opened(bare_png(engines_png(picture)))
    assert before.mode == after.mode
    assert before.getpalette() == after.getpalette()
    assert np.array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.images
def test_what_is_bare_already_is_the_same_bytes() -> None:
    """A PNG without metadata passes through byte by byte, and so is its own reference."""
    assert bare_png(PLAIN) is PLAIN
    assert bare_png(engines_png()) == bare_png(bare_png(engines_png()))


@pytest.mark.images
def test_unknown_chunks_and_what_follows_the_end_are_dropped() -> None:
    """Data cannot hide in an unknown chunk or after the picture."""
    hidden = PLAIN[:-12] + chunk(b"prVt", SECRET) + chunk(b"tIME", bytes(7)) + PLAIN[-12:] + SECRET
    assert bare_png(hidden) == PLAIN
    assert bare_png(PLAIN + SECRET) == PLAIN


@pytest.mark.images
@pytest.mark.parametrize("data", [b"", b"GIF89a", PLAIN[:8], PLAIN[:40], PLAIN[:-5]])
def test_what_is_no_whole_png_is_no_result(data: bytes) -> None:
    """A file that cannot be read cannot be proved free of metadata."""
    with pytest.raises(EngineFailed):
        bare_png(data)
