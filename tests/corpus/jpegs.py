"""JPEGs as cameras, phones and programs write them, and as broken transfers leave them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image

from tests.corpus import profiles
from tests.corpus.pngs import turned
from tests.corpus.scenes import (
    BROKEN,
    OTHER,
    Case,
    exchanged,
    grey,
    grey_expected,
    linear,
    samples,
    scene,
)
from tests.support.pictures import file, noise, sideways

EOI = b"\xff\xd9"
_TRAILER = b"dhav\x59\x19\x01\x00"


def documented() -> Iterator[Case]:
    same, upright = "the image", "the image, upright"
    profiled = jpeg(scene(), icc_profile=profiles.rgb(2.2, "x", profiles.EXCHANGED))
    yield Case("JPEG", "a.jpg", jpeg(scene()), scene(), same, "image/jpeg")
    yield Case("JPEG, progressive", "a.jpg", jpeg(scene(), progressive=True), scene(), same)
    yield Case(
        "JPEG, turned by EXIF", "a.jpg", jpeg(turned(scene(), 6), exif=sideways()), scene(), upright
    )
    yield Case(
        "JPEG in grey", "a.jpg", jpeg(grey()), grey_expected(), "the image, as grey as it was"
    )
    yield Case("JPEG in CMYK", "a.jpg", jpeg(scene().convert("CMYK")), scene(), "the image, in RGB")
    yield Case(
        "JPEG with a colour profile",
        "a.jpg",
        profiled,
        exchanged(),
        "the colours that the profile means, in sRGB",
    )
    yield Case(
        "JPEG with a second image behind it, cut off",
        "a.jpg",
        phone("half"),
        scene(),
        "the first image",
    )
    yield Case("JPEG without its end marker", "a.jpg", jpeg(scene())[:-2] + _TRAILER, scene(), same)
    yield Case("JPEG of 12 bits", "a.jpg", deep(), scene(), "the image, in 8 bits")
    yield Case("JPEG of 2,000 scans", "a.jpg", of_scans(2_000, 64), OTHER, "the limit of scans")
    yield Case("Truncated JPEG", "a.jpg", jpeg(scene())[:-200], BROKEN, "it cannot be decoded")


def siblings() -> Iterator[Case]:
    yield from _kinds()
    yield from _phones()
    yield from _ends()
    yield from _profiled()


def _kinds() -> Iterator[Case]:
    for subsampling in (0, 1, 2):
        data = jpeg(scene(), subsampling=subsampling)
        yield _case(f"subsampling {subsampling}", data, scene())
    yield _case("restart markers", jpeg(scene(), restart_marker_blocks=2), scene())
    yield _case("grey, progressive", jpeg(grey(), progressive=True), grey_expected())
    yield _case("quality 100, optimized", jpeg(scene(), optimize=True), scene())
    cmyk = jpeg(scene().convert("CMYK"))
    # Without the marker, inks are not inverted; Pillow stores them inverted for a reader that
    # expects it.
    other = Image.eval(scene().convert("CMYK"), lambda ink: 255 - ink).convert("RGB")
    yield _case("CMYK without Adobe's marker", _without(cmyk, 0xEE), other)
    inks = np.asarray(scene().convert("CMYK"))
    ycck = imagecodecs.jpeg8_encode(
        255 - inks, 95, colorspace="CMYK", outcolorspace="YCCK", subsampling=(1, 1)
    )
    yield _case("YCCK with Adobe's marker", bytes(ycck), scene())
    as_rgb = imagecodecs.jpeg8_encode(
        np.asarray(scene()), 95, colorspace="RGB", outcolorspace="RGB"
    )
    yield _case("RGB by Adobe's marker", bytes(as_rgb), scene())
    yield _case(
        "RGB with a profile",
        _inserted(bytes(as_rgb), _icc(profiles.rgb(2.2, "x", profiles.EXCHANGED))),
        exchanged(),
    )
    yield _case(
        "grey of 12 bits",
        bytes(imagecodecs.jpeg8_encode(samples(grey(), 12), 98, bitspersample=12)),
        grey_expected(),
    )
    lossless = imagecodecs.jpeg8_encode(np.asarray(scene()), lossless=True)
    yield _case("lossless", bytes(lossless), scene())
    lossless = imagecodecs.jpeg8_encode(samples(grey()), lossless=True, bitspersample=16)
    yield _case("lossless, grey of 16 bits", bytes(lossless), grey_expected())
    for orientation in range(1, 9):
        data = jpeg(turned(scene(), orientation), exif=sideways(orientation))
        yield _case(f"orientation {orientation}", data, scene())
    yield _case("orientation 9", jpeg(scene(), exif=sideways(9)), scene())
    yield _case(
        "broken EXIF", jpeg(scene(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(40)), scene()
    )
    exif = sideways()
    exif[0x010F] = "ACME"
    odd = exif.tobytes().replace(b"\x01\x0f\0\2", b"\x01\0\0\2")  # a width that is text
    yield _case("EXIF with a text for a width", jpeg(turned(scene(), 6), exif=odd), scene())
    yield _case(
        "500 comments", _inserted(jpeg(scene()), _segment(0xFE, b"x" * 60_000) * 500), scene()
    )
    yield Case("JPEG: 12 bits, half", "a.jpg", deep()[: len(deep()) // 2], BROKEN)


def _phones() -> Iterator[Case]:
    for second in ("whole", "gone", "half", "zeros", "noise"):
        yield _case(f"a second image: {second}", phone(second), scene())
    gain = grey().resize((16, 12)).convert("RGB")
    yield _case(
        "a gain map behind it",
        file(scene(), "MPO", save_all=True, append_images=[gain], quality=95),
        scene(),
    )
    yield _case("a film behind it", jpeg(scene()) + b"\0\0\0\x18ftypmp42" + bytes(300), scene())
    thumbnail = jpeg(grey().resize((16, 12)))
    embedded = _inserted(jpeg(scene()), _segment(0xE1, b"Exif\0\0" + thumbnail))
    yield _case("a thumbnail in a segment", embedded, scene())


def _ends() -> Iterator[Case]:
    large = noise(size=(200, 150))
    for name, options in (
        ("baseline", {}),
        ("progressive", {"progressive": True}),
        ("restart markers", {"restart_marker_blocks": 2}),
        ("grey", {}),
    ):
        data = jpeg(grey() if name == "grey" else scene(), **options)
        shown = grey_expected() if name == "grey" else scene()
        yield _case(f"{name}, no EOI", data[:-2], shown)
        yield _case(f"{name}, half an EOI", data[:-1], shown)
        yield _case(f"{name}, a trailer for an EOI", data[:-2] + _TRAILER, shown)
        yield _case(f"{name}, zeros for an EOI", data[:-2] + bytes(100), shown)
        long = jpeg(large.convert("L") if name == "grey" else large, **options)
        for kept in (0.3, 0.6, 0.9, 0.99):
            cut = long[: int(len(long) * kept)]
            yield Case(f"JPEG: {name}, {kept:.0%} of it", "a.jpg", cut, BROKEN)
            yield Case(f"JPEG: {name}, {kept:.0%} of it and an EOI", "a.jpg", cut + EOI, BROKEN)
            yield Case(
                f"JPEG: {name}, {kept:.0%} of it and zeros", "a.jpg", cut + bytes(500), BROKEN
            )
    subsampled = file(large, "JPEG", quality=90)
    for lost in (3, 10, 30):
        cut = subsampled[: -2 - lost]
        yield Case(f"JPEG: without the last {lost} bytes of its scan", "a.jpg", cut + EOI, BROKEN)
    no_scan = jpeg(scene())
    yield Case("JPEG: no scan", "a.jpg", no_scan[: no_scan.index(b"\xff\xda")] + EOI, BROKEN)
    yield Case("JPEG: 9,000 scans", "a.jpg", of_scans(9_000, 400), OTHER)
    yield _case(
        "progressive, a scan of it ten times",
        of_scans(10, 64),
        Image.new("RGB", (64, 64), (128,) * 3),
    )


def _profiled() -> Iterator[Case]:
    swapped = profiles.rgb(2.2, "x", profiles.EXCHANGED)
    linear8 = Image.fromarray(np.round(linear(scene()) * 255).astype(np.uint8))
    yield _case("linear", jpeg(linear8, icc_profile=profiles.rgb(1, "sRGB built-in")), scene())
    stored = Image.fromarray(np.round(linear(grey()) ** (1 / 1.8) * 255).astype(np.uint8))
    yield _case(
        "grey with its profile", jpeg(stored, icc_profile=profiles.grey(1.8)), grey_expected()
    )
    yield _case("RGB with a profile for grey", jpeg(scene(), icc_profile=profiles.grey(1)), scene())
    inks = scene().convert("CMYK")
    yield _case("CMYK with its profile", jpeg(inks, icc_profile=profiles.cmyk()), scene())
    c, m, y, k = inks.split()
    other = Image.merge("CMYK", (m, c, y, k))
    yield _case(
        "CMYK, inks exchanged by the profile",
        jpeg(other, icc_profile=profiles.cmyk(exchange=True)),
        scene(),
    )
    yield _case("CMYK with a profile for RGB", jpeg(inks, icc_profile=swapped), scene())
    noise_tag = np.random.default_rng(1).integers(0, 256, 300_000, np.uint8).tobytes()
    large = profiles.rgb(2.2, "x", profiles.EXCHANGED, [(b"LUTx", b"data" + bytes(8) + noise_tag)])
    yield _case("a profile in five segments", jpeg(scene(), icc_profile=large), exchanged())
    yield _case(
        "a profile of which a part is missing",
        _inserted(jpeg(scene()), _icc(swapped, count=2)),
        scene(),
    )


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return file(image, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def deep() -> bytes:
    return bytes(imagecodecs.jpeg8_encode(samples(scene(), 12), 98, bitspersample=12))


def phone(second: str) -> bytes:
    """A photo and a second image in the same file (MPF): whole, missing, cut, or zeros or
    noise."""
    first = file(scene(), "MPO", save_all=True, append_images=[scene()], quality=95)
    end = first.rindex(b"\xff\xd8\xff")
    rest = {
        "whole": first[end:],
        "gone": b"",
        "half": first[end : (end + len(first)) // 2],
        "zeros": bytes(len(first) - end),
        "noise": np.random.default_rng(0).integers(0, 256, len(first) - end, np.uint8).tobytes(),
    }
    return first[:end] + rest[second]


def of_scans(count: int, side: int) -> bytes:
    """Return a progressive grey JPEG that repeats its first AC scan `count` times."""
    data = file(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=75)
    starts = [n for n in range(len(data)) if data[n : n + 2] == b"\xff\xda"]
    of_ac = next(n for n in starts if data[n + 7])  # Ss, with one component
    behind = min(n for n in range(of_ac + 2, len(data)) if data[n] == 0xFF and data[n + 1])
    return data[:behind] + data[of_ac:behind] * (count - 1) + data[behind:]


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def _icc(profile: bytes, count: int = 1) -> bytes:
    return _segment(0xE2, b"ICC_PROFILE\0" + bytes([1, count]) + profile)


def _inserted(data: bytes, segments: bytes) -> bytes:
    return data[:2] + segments + data[2:]


def _without(data: bytes, marker: int) -> bytes:
    start = data.index(bytes([0xFF, marker]))
    (size,) = struct.unpack_from(">H", data, start + 2)
    return data[:start] + data[start + 2 + size :]


def _case(what: str, data: bytes, expected: Image.Image) -> Case:
    return Case(f"JPEG: {what}", "a.jpg", data, expected)
