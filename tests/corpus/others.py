"""BMP, WebP, HEIC and AVIF files, and files that are not pictures."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import imagecodecs
import numpy as np
import pillow_heif
from PIL import Image, ImageOps

from restoration.images import MEBIBYTE
from tests.corpus import profiles
from tests.corpus.jpegs import jpeg
from tests.corpus.pngs import turned
from tests.corpus.scenes import (
    BROKEN,
    LARGE,
    OTHER,
    RED,
    SIZE,
    Case,
    Refused,
    exchanged,
    grey,
    grey_expected,
    half_alpha,
    linear,
    samples,
    scene,
    with_alpha,
)
from tests.support.pictures import file, sideways

LIMIT_BYTES = 50 * MEBIBYTE
_PAGES = {"save_all": True, "append_images": [ImageOps.mirror(scene())]}
_SWAPPED = profiles.rgb(2.2, "x", profiles.EXCHANGED)


def documented() -> Iterator[Case]:
    same, transparent = "the image", "the image, as transparent as it was"
    yield Case("WebP", "a.webp", webp(scene()), scene(), same)
    yield Case(
        "WebP with transparency",
        "a.webp",
        file(with_alpha(scene()), "WEBP", lossless=True),
        with_alpha(scene()),
        transparent,
    )
    yield Case(
        "WebP, animated",
        "a.webp",
        file(scene(), "WEBP", **_PAGES),
        OTHER,
        "a file may contain one image only",
    )
    yield Case("BMP", "a.bmp", file(scene(), "BMP"), scene(), same)
    yield Case(
        "BMP whose alpha is 0 everywhere",
        "a.bmp",
        bmp(scene(), alpha=0),
        scene(),
        "the image, opaque",
    )
    yield Case("HEIC", "a.heic", heic(scene()), scene(), same)
    yield Case("HEIC of 10 bits", "a.heic", deep_heic(), scene(), "the image, in 8 bits")
    yield Case(
        "HEIC with transparency",
        "a.heic",
        heic(with_alpha(scene())),
        with_alpha(scene()),
        transparent,
    )
    yield Case(
        "HEIC, turned",
        "a.heic",
        heic(turned(scene(), 6), orientation=6),
        scene(),
        "the image, upright",
    )
    yield Case("AVIF", "a.avif", avif(scene()), scene(), same)
    yield Case("AVIF of 10 bits", "a.avif", deep_avif(), scene(), "the image, in 8 bits")
    yield Case(
        "AVIF, animated",
        "a.avif",
        file(scene(), "AVIF", **_PAGES),
        OTHER,
        "a file may contain one image only",
    )
    one = Image.new("RGB", (1, 1), RED)
    plain, photo = file(scene(), "PNG"), jpeg(scene())
    by_content = "the image: the content decides"
    yield Case("1x1", "a.png", file(one, "PNG"), one, same)
    yield Case("Wrong extension", "a.jpg", plain, scene(), by_content)
    yield Case("Wrong type", "a.png", plain, scene(), by_content, "text/html")
    broken = jpeg(scene(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(40))
    yield Case("Broken metadata", "a.jpg", broken, scene(), "the image, not rotated")
    ignored = "the image; the rest of the file is not read"
    yield Case(
        "Polyglot, a ZIP behind a JPEG", "a.jpg", photo + b"PK\3\4" + bytes(300), scene(), ignored
    )
    yield Case("50 MiB", "a.jpg", photo.ljust(LIMIT_BYTES, b"\0"), scene(), same)
    yield Case("Empty file", "a.jpg", b"", Refused(400, "invalid_request"), "it is empty")
    types = "the accepted types"
    yield Case("Text named .jpg", "a.jpg", b"no picture at all", OTHER, types, "image/jpeg")
    yield Case("GIF", "a.gif", file(scene(), "GIF"), OTHER, types)
    yield Case("SVG", "a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", OTHER, types)
    yield Case(
        "JPEG XL", "a.jxl", bytes(imagecodecs.jpegxl_encode(np.asarray(scene()))), OTHER, types
    )
    yield Case("MP4", "a.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(300), OTHER, types)
    yield Case("Polyglot, a JPEG in a PDF", "a.jpg", b"%PDF-1.7\n" + photo, OTHER, types)
    yield Case(
        "50 MiB and one byte", "a.jpg", photo.ljust(LIMIT_BYTES + 1, b"\0"), LARGE, "the limit"
    )


def siblings() -> Iterator[Case]:
    yield from _webps()
    yield from _bmps()
    yield from _heics()
    yield from _avifs()


def _webps() -> Iterator[Case]:
    half = with_alpha(scene(), half_alpha())
    yield _case("WebP: lossless", file(scene(), "WEBP", lossless=True), scene())
    yield _case("WebP: lossy with alpha", webp(half), half)
    yield _case("WebP: lossless with half alpha", file(half, "WEBP", lossless=True), half)
    yield _case(
        "WebP: a profile", file(scene(), "WEBP", lossless=True, icc_profile=_SWAPPED), exchanged()
    )
    yield _case(
        "WebP: a profile and alpha",
        file(half, "WEBP", lossless=True, icc_profile=_SWAPPED),
        with_alpha(exchanged(), half_alpha()),
    )
    yield _case(
        "WebP: a profile for grey",
        file(scene(), "WEBP", lossless=True, icc_profile=profiles.grey(1)),
        scene(),
    )
    for orientation in (3, 6, 7):
        stored = turned(scene(), orientation)
        yield _case(
            f"WebP: orientation {orientation}",
            file(stored, "WEBP", lossless=True, exif=sideways(orientation)),
            scene(),
        )
    yield _case("WebP: a trailer", webp(scene()) + b"PK\3\4" + bytes(50), scene())
    yield Case("WebP: half", "a.webp", webp(scene())[:-80], BROKEN)
    yield Case("WebP: lossless, half", "a.webp", file(scene(), "WEBP", lossless=True)[:-40], BROKEN)
    one = file(with_alpha(scene()), "WEBP", save_all=True, append_images=[ImageOps.mirror(scene())])
    yield Case("WebP: animated with alpha", "a.webp", one, OTHER)


def _bmps() -> Iterator[Case]:
    yield _case("BMP: alpha", bmp(scene(), alpha=None), with_alpha(scene()))
    yield _case("BMP: 32 bits without a mask for alpha", _bmp32_plain(), scene())
    for masks, name in (((0xF800, 0x07E0, 0x001F), "565"), ((0x7C00, 0x03E0, 0x001F), "555")):
        yield _case(f"BMP: 16 bits, {name}", _bmp16(masks), scene())
    yield _case("BMP: 16 bits without masks", _bmp16(None), scene())
    yield _case("BMP: a palette", file(scene().quantize(16), "BMP"), scene())
    yield _case(
        "BMP: 1 bit",
        file(grey().convert("1", dither=Image.Dither.NONE), "BMP"),
        grey().convert("1", dither=Image.Dither.NONE).convert("RGB"),
    )
    yield _case("BMP: 4 bits", _bmp_palette(4), scene())
    yield _case("BMP: grey", file(grey(), "BMP"), grey_expected())
    yield _case("BMP: top-down", _bmp_top_down(), scene())
    yield _case("BMP: OS/2", _bmp_os2(), scene())
    yield _case("BMP: RLE of 8 bits", _bmp_rle8(), scene())
    yield _case("BMP: RLE of 4 bits", _bmp_rle4(), scene())
    yield _case("BMP: V5 with a profile", _bmp_v5(_SWAPPED), exchanged())
    yield _case("BMP: V5 with sRGB", _bmp_v5(None), scene())
    yield _case("BMP: V4 with end points and gamma", _bmp_v4_calibrated(), scene())
    yield _case("BMP: 10 bits a channel by masks", _bmp_deep(), scene())
    yield Case("BMP: half", "a.bmp", file(scene(), "BMP")[:-200], BROKEN)
    yield Case("BMP: RLE, half", "a.bmp", _bmp_rle8()[:-100], BROKEN)
    yield Case("BMP: a JPEG in it", "a.bmp", _bmp_jpeg(), OTHER)


def _heics() -> Iterator[Case]:
    half = with_alpha(scene(), half_alpha())
    for orientation in range(1, 9):
        yield Case(
            f"HEIC: orientation {orientation}",
            "a.heic",
            heic(turned(scene(), orientation), orientation=orientation),
            scene(),
        )
    yield Case(
        "HEIC: an orientation in EXIF alone, which says nothing",
        "a.heic",
        _orientation_in_exif_alone(),
        scene(),
    )
    yield Case("HEIC: half alpha", "a.heic", heic(half), half)
    yield Case("HEIC: a profile", "a.heic", heic(scene(), icc_profile=_SWAPPED), exchanged())
    p3 = np.clip(
        linear(scene()) @ np.array(profiles.SRGB) @ np.linalg.inv(np.array(profiles.P3)), 0, 1
    )
    encoded = np.where(p3 <= 0.0031308, 12.92 * p3, 1.055 * p3 ** (1 / 2.4) - 0.055)
    yield Case(
        "HEIC: Display P3 by nclx",
        "a.heic",
        heic(
            Image.fromarray(np.round(encoded * 255).astype(np.uint8)),
            color_primaries=12,
            transfer_characteristics=13,
            matrix_coefficients=1,
            full_range_flag=1,
        ),
        scene(),
    )
    yield Case("HEIC: grey", "a.heic", heic(grey()), grey_expected())
    two = pillow_heif.from_pillow(scene())
    two.add_from_pillow(ImageOps.mirror(scene()))
    out = io.BytesIO()
    two.save(out, quality=95, primary_index=0)
    yield Case("HEIC: two pictures", "a.heic", out.getvalue(), OTHER)
    yield Case("HEIC: half", "a.heic", heic(scene())[:-40], BROKEN)
    still = heic(scene())
    sequence = still[:8] + b"hevc" + still[12:]
    yield Case("HEIC: a sequence", "a.heic", sequence, OTHER)


def _avifs() -> Iterator[Case]:
    half = with_alpha(scene(), half_alpha())
    for orientation in range(1, 9):
        yield Case(
            f"AVIF: orientation {orientation}",
            "a.avif",
            avif(turned(scene(), orientation), exif=sideways(orientation)),
            scene(),
        )
    yield Case("AVIF: half alpha", "a.avif", avif(half), half)
    yield Case("AVIF: a profile", "a.avif", avif(scene(), icc_profile=_SWAPPED), exchanged())
    yield Case("AVIF: grey", "a.avif", avif(grey()), grey_expected())
    p3 = np.clip(
        linear(scene()) @ np.array(profiles.SRGB) @ np.linalg.inv(np.array(profiles.P3)), 0, 1
    )
    encoded = np.where(p3 <= 0.0031308, 12.92 * p3, 1.055 * p3 ** (1 / 2.4) - 0.055)
    yield Case(
        "AVIF: Display P3 by nclx",
        "a.avif",
        bytes(
            imagecodecs.avif_encode(
                np.round(encoded * 255).astype(np.uint8), 95, primaries=12, transfer=13, matrix=1
            )
        ),
        scene(),
    )
    for bits in (10, 12):
        yield Case(
            f"AVIF: {bits} bits with alpha",
            "a.avif",
            bytes(imagecodecs.avif_encode(samples(half, bits), 98, bitspersample=bits)),
            half,
        )
    pq = np.clip(linear(scene()), 0, 1) * 203 / 10_000
    y = pq ** (2610 / 16384)
    signal = ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)
    yield Case(
        "AVIF: PQ",
        "a.avif",
        bytes(
            imagecodecs.avif_encode(
                np.round(signal * 1023).astype(np.uint16),
                98,
                bitspersample=10,
                primaries=1,
                transfer=16,
                matrix=1,
            )
        ),
        scene(),
    )
    yield Case("AVIF: half", "a.avif", avif(scene())[:-40], BROKEN)


def webp(image: Image.Image, **options: Any) -> bytes:
    return file(image, "WEBP", quality=95, **options)


def heic(image: Image.Image, orientation: int | None = None, **options: Any) -> bytes:
    if orientation is not None:
        options["exif"] = sideways(orientation).tobytes()
    out = io.BytesIO()
    pillow_heif.from_pillow(image).save(out, quality=95, chroma=444, **options)
    return out.getvalue()


def _orientation_in_exif_alone() -> bytes:
    entry = bytes.fromhex("0112 0003 00000001")
    data = heic(scene(), orientation=1)
    assert entry + b"\0\1" in data
    return data.replace(entry + b"\0\1", entry + b"\0\6")


def deep_heic() -> bytes:
    out = io.BytesIO()
    pillow_heif.encode("RGB;16", SIZE, samples(scene()).tobytes(), out, quality=95, chroma=444)
    return out.getvalue()


def avif(image: Image.Image, **options: Any) -> bytes:
    return file(image, "AVIF", quality=95, subsampling="4:4:4", **options)


def deep_avif() -> bytes:
    return bytes(imagecodecs.avif_encode(samples(scene(), 10), 98, bitspersample=10))


def bmp(image: Image.Image, alpha: int | None) -> bytes:
    """32 bits with masks, its alpha the same everywhere, or as of `with_alpha` for None."""
    rgba = np.asarray(with_alpha(image)).copy()
    if alpha is not None:
        rgba[..., 3] = alpha
    data = rgba[::-1, :, [2, 1, 0, 3]].tobytes()
    head = struct.pack("<IiiHHIIiiII", 108, *SIZE, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return _bmp(head, b"", data)


def _bmp(head: bytes, between: bytes, data: bytes, behind: bytes = b"") -> bytes:
    start = 14 + len(head) + len(between)
    size = start + len(data) + len(behind)
    return struct.pack("<2sIHHI", b"BM", size, 0, 0, start) + head + between + data + behind


def _info(bits: int, compression: int, size: int, colours: int = 0, height: int = SIZE[1]) -> bytes:
    return struct.pack(
        "<IiiHHIIiiII", 40, SIZE[0], height, 1, bits, compression, size, 0, 0, colours, 0
    )


def _bmp32_plain() -> bytes:
    bgr = np.asarray(scene())[::-1, :, ::-1]
    data = np.dstack([bgr, np.zeros(SIZE[::-1], np.uint8)]).tobytes()
    return _bmp(_info(32, 0, len(data)), b"", data)


def _bmp16(masks: tuple[int, int, int] | None) -> bytes:
    red, green, blue = (np.asarray(band).astype(np.uint16) for band in scene().split())
    if masks and masks[1] == 0x07E0:
        values = red >> 3 << 11 | green >> 2 << 5 | blue >> 3
    else:
        values = red >> 3 << 10 | green >> 3 << 5 | blue >> 3
    data = values[::-1].astype("<u2").tobytes()
    between = struct.pack("<III", *masks) if masks else b""
    return _bmp(_info(16, 3 if masks else 0, len(data)), between, data)


def _bmp_deep() -> bytes:
    red, green, blue = (samples(band, 10).astype(np.uint32) for band in scene().split())
    data = (red << 20 | green << 10 | blue)[::-1].astype("<u4").tobytes()
    return _bmp(_info(32, 3, len(data)), struct.pack("<III", 0x3FF00000, 0xFFC00, 0x3FF), data)


def _indices() -> tuple[np.ndarray, bytes]:
    picture = scene().quantize(4)
    listed = np.array(picture.getpalette()).reshape(-1, 3)[:4]
    table = b"".join(bytes([b, g, r, 0]) for r, g, b in listed)
    return np.asarray(picture), table


def _bmp_palette(bits: int) -> bytes:
    indices, table = _indices()
    data = (indices[::-1, ::2] << 4 | indices[::-1, 1::2]).astype(np.uint8).tobytes()
    return _bmp(_info(bits, 0, len(data), 4), table, data)


def _bmp_rle8() -> bytes:
    indices, table = _indices()
    half = SIZE[0] // 2
    rows = [bytes([half, row[0], half, row[-1], 0, 0]) for row in indices[::-1].tolist()]
    data = b"".join(rows) + b"\0\1"
    return _bmp(_info(8, 1, len(data), 4), table, data)


def _bmp_rle4() -> bytes:
    indices, table = _indices()
    half = SIZE[0] // 2
    rows = [bytes([half, row[0] * 17, half, row[-1] * 17, 0, 0]) for row in indices[::-1].tolist()]
    data = b"".join(rows) + b"\0\1"
    return _bmp(_info(4, 2, len(data), 4), table, data)


def _bmp_top_down() -> bytes:
    data = np.asarray(scene())[:, :, ::-1].tobytes()
    return _bmp(_info(24, 0, len(data), height=-SIZE[1]), b"", data)


def _bmp_os2() -> bytes:
    data = np.asarray(scene())[::-1, :, ::-1].tobytes()
    return _bmp(struct.pack("<IHHHH", 12, *SIZE, 1, 24), b"", data)


def _bmp_jpeg() -> bytes:
    data = jpeg(scene())
    return _bmp(_info(0, 4, len(data)), b"", data)


def _bmp_v5(profile: bytes | None) -> bytes:
    data = np.asarray(scene())[::-1, :, ::-1].tobytes()
    head = struct.pack("<IiiHHIIiiII", 124, *SIZE, 1, 24, 0, len(data), 0, 0, 0, 0) + bytes(16)
    head += (b"DEBM" if profile else b"BGRs") + bytes(48)
    place = (124 + len(data), len(profile)) if profile else (0, 0)
    head += struct.pack("<IIII", 4, *place, 0)
    return _bmp(head, b"", data, profile or b"")


def _bmp_v4_calibrated() -> bytes:
    """Linear light, as the end points (of sRGB) and a gamma of 1 say."""
    data = np.round(linear(scene()) * 255).astype(np.uint8)[::-1, :, ::-1].tobytes()
    head = struct.pack("<IiiHHIIiiII", 108, *SIZE, 1, 24, 0, len(data), 0, 0, 0, 0) + bytes(16)
    ends = ((0.4124, 0.2126, 0.0193), (0.3576, 0.7152, 0.1192), (0.1805, 0.0722, 0.9505))
    head += bytes(4) + struct.pack("<9i", *(round(v * 2**30) for end in ends for v in end))
    return _bmp(head + struct.pack("<3I", *[1 << 16] * 3), b"", data)


def _case(what: str, data: bytes, expected: Image.Image) -> Case:
    return Case(what, f"a.{what[:4].strip(':').lower()}", data, expected)
