"""Files that are accepted as pictures, and refusals of the others."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from actors.images.reader import ImageInfo, examine
from restoration.errors import BrokenImage, ImageTooLarge, InvalidRequest, UnsupportedImage
from restoration.images import ImageType, UploadLimits
from tests.support.pictures import (
    ACCEPTED,
    HEIGHT,
    JPEG,
    PNG,
    WIDTH,
    chunk,
    file,
    noise,
)

LIMITS = UploadLimits()
files = pytest.mark.parametrize(("kind", "data"), ACCEPTED.values(), ids=ACCEPTED)


@files
def test_every_accepted_type_is_told_by_its_content(kind: ImageType, data: bytes) -> None:
    """This holds for every kind of colours and compression."""
    assert examine(data, LIMITS) == ImageInfo(kind, WIDTH, HEIGHT)


@files
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_a_file_that_was_cut_off_is_refused(kind: ImageType, data: bytes, kept: float) -> None:
    """A whole header is not enough: pixels are missing, and the message is for a person."""
    with pytest.raises(BrokenImage, match="the image cannot be decoded") as refusal:
        examine(data[: int(len(data) * kept)], LIMITS)
    assert " at 0x" not in refusal.value.message


@settings(deadline=None)
@given(st.sampled_from(list(ACCEPTED.values())), st.data())
def test_no_damage_raises_anything_else(case: tuple[ImageType, bytes], data: st.DataObject) -> None:
    """A damaged file is accepted or refused as InvalidRequest, and never causes a crash."""
    damaged = bytearray(case[1])
    # headers are at the beginning; a TIFF's directory may be at the end
    places = st.one_of(
        st.integers(0, min(60, len(damaged) - 1)),
        st.integers(max(0, len(damaged) - 200), len(damaged) - 1),
    )
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1)):
        damaged[place] = value
    try:
        examine(bytes(damaged), LIMITS)
    except InvalidRequest:
        pass


def test_a_tiff_without_a_width_is_refused() -> None:
    """Pillow's TIFF decoder answers a missing tag with TypeError, which must not escape."""
    data = ACCEPTED["tiff"][1]
    width = struct.pack("<HHI", 256, 4, 1)
    assert width in data
    with pytest.raises(BrokenImage):
        examine(data.replace(width, struct.pack("<HHI", 60_000, 4, 1)), LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a" + bytes(100),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n" + ACCEPTED["jpeg"][1],
        b"\0" + ACCEPTED["png"][1],
    ],
    ids=["gif", "svg", "a JPEG in a PDF", "a PNG behind a byte"],
)
def test_other_types_are_refused(data: bytes) -> None:
    """Only the first bytes decide the type; a picture hidden further on does not count."""
    with pytest.raises(UnsupportedImage):
        examine(data, LIMITS)


def test_the_decoder_is_the_one_of_the_first_bytes() -> None:
    """A file with one type's signature and another's content reaches no other decoder."""
    gif = file(noise("P"), "GIF")
    for signature in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"MM\x00*", b"BM"):
        with pytest.raises(BrokenImage):
            examine(signature + gif, LIMITS)


def test_what_follows_a_picture_is_ignored() -> None:
    """A PNG with a ZIP behind it is that PNG: bytes past the end are never interpreted."""
    polyglot = ACCEPTED["png"][1] + b"PK\x03\x04" + bytes(500)
    assert examine(polyglot, LIMITS) == ImageInfo(PNG, WIDTH, HEIGHT)


def test_nothing_at_all_is_refused() -> None:
    """An empty upload is reported as the caller's mistake."""
    with pytest.raises(InvalidRequest, match="empty"):
        examine(b"", LIMITS)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_several_pictures_in_one_file_are_refused(format: str) -> None:
    """The engine would restore one of them, and the rest would be lost silently."""
    pages = {"save_all": True, "append_images": [noise("L").convert("RGB")]}
    with pytest.raises(UnsupportedImage, match="more than one image"):
        examine(file(noise(), format, **pages), LIMITS)


def test_a_photo_with_a_preview_in_it_is_accepted() -> None:
    """Cameras add previews to their JPEGs (MPO); the photo itself is the first."""
    preview = noise(size=(16, 12))
    photo = file(noise(), "MPO", save_all=True, append_images=[preview])
    assert examine(photo, LIMITS) == ImageInfo(JPEG, WIDTH, HEIGHT)


class TestLimits:
    def test_bytes(self) -> None:
        """A file of exactly the limit passes; one byte more is refused before it is parsed."""
        data = ACCEPTED["png"][1]
        examine(data, UploadLimits(max_bytes=len(data)))
        with pytest.raises(ImageTooLarge, match="bytes"):
            examine(b"?" * len(data), UploadLimits(max_bytes=len(data) - 1))

    def test_pixels(self) -> None:
        """Exactly as many pixels as allowed pass, one column more does not."""
        limits = UploadLimits(max_pixels=WIDTH * HEIGHT)
        examine(file(noise(), "PNG"), limits)
        with pytest.raises(ImageTooLarge, match="65x48"):
            examine(file(noise(size=(WIDTH + 1, HEIGHT)), "PNG"), limits)

    def test_sides(self) -> None:
        """No side may be longer than allowed, however few the pixels."""
        limits = UploadLimits(max_side=WIDTH)
        examine(file(noise(size=(1, WIDTH)), "PNG"), limits)
        with pytest.raises(ImageTooLarge, match="65"):
            examine(file(noise(size=(1, WIDTH + 1)), "PNG"), limits)


def _bmp_header(width: int, height: int) -> bytes:
    return (
        struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(100)
    )


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body


def _tiff_header(width: int, height: int) -> bytes:
    return _tiff({256: width, 257: height, 273: 8, 278: height, 279: 100})


def _tiff_tile(width: int, height: int) -> bytes:
    """Return a picture of 16 x 16 pixels in a tile of `width` x `height`."""
    return _tiff({256: 16, 257: 16, 322: width, 323: height, 324: 8, 325: 100})


def _tiff(tags: dict[int, int]) -> bytes:
    tags = {**tags, 258: 8, 259: 8, 262: 1, 277: 1}  # one channel of 8 bits, deflated
    pixels = zlib.compress(bytes(100)).ljust(100, b"\0")
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def _jpeg_header(width: int, height: int) -> bytes:
    """Return a small JPEG that claims to be large."""
    data = bytearray(ACCEPTED["jpeg"][1])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _webp_header(width: int, height: int) -> bytes:
    data = bytearray(file(noise(), "WEBP", lossless=True))
    data[21:25] = struct.pack("<I", width - 1 | (height - 1) << 14)
    return bytes(data)


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@pytest.fixture
def peak() -> Callable[[], int]:
    """Return by how many bytes at most this process has grown since the test began."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    return lambda: _peak_bytes() - before


@pytest.mark.parametrize("side", [4_001, 10_000, 16_000])
@pytest.mark.parametrize(
    "make", [_png_header, _bmp_header, _tiff_header, _tiff_tile, _jpeg_header, _webp_header]
)
@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_before_it_goes_off(
    make: Callable[[int, int], bytes], side: int, peak: Callable[[], int]
) -> None:
    """A small file that claims to be a huge picture is too large, and costs no memory."""
    bomb = make(side, side)
    assert len(bomb) < 10_000
    with pytest.raises(ImageTooLarge):
        examine(bomb, LIMITS)
    assert peak() < side * side / 2


def test_a_picture_is_as_large_as_it_is_upright() -> None:
    """The EXIF orientation counts as in the engine, because result limits depend on it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "PNG", exif=exif)
    assert examine(buffer.getvalue(), UploadLimits()) == ImageInfo(ImageType.PNG, 20, 30)
