"""PNGs of every colour type and depth, and with every way to state the colour space."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tests.corpus import profiles
from tests.corpus.scenes import (
    BROKEN,
    LARGE,
    OTHER,
    SAND,
    SIZE,
    Case,
    exchanged,
    grey,
    grey_expected,
    half_alpha,
    linear,
    right_half,
    samples,
    scene,
    with_alpha,
)
from tests.support.pictures import chunk, file, sideways

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
_BEHIND_IHDR = len(SIGNATURE) + 25
_KEY = (0x1234, 0xABCD, 0x5678)  # the colour that tRNS makes transparent


def documented() -> Iterator[Case]:
    same = "the image"
    seen_through = "the image, as transparent as it was (white in a JPEG)"
    yield Case(
        "PNG with transparency",
        "a.png",
        file(with_alpha(scene()), "PNG"),
        with_alpha(scene()),
        seen_through,
    )
    yield Case("PNG with a palette", "a.png", file(scene().quantize(16), "PNG"), scene(), same)
    yield Case(
        "PNG in 16 bits of grey",
        "a.png",
        file(Image.fromarray(samples(grey())), "PNG"),
        grey_expected(),
        "the image, in 8 bits",
    )
    yield Case(
        "PNG in 16 bits of colour",
        "a.png",
        png(samples(scene()), RGB, 16),
        scene(),
        "the image, in 8 bits",
    )
    yield Case(
        "PNG, one colour of which is transparent",
        "a.png",
        _keyed(samples(scene()), RGB, 16),
        with_alpha(scene()),
        seen_through,
    )
    yield Case(
        "PNG in linear light, by its profile",
        "a.png",
        _with_profile(_linear8(), profiles.rgb(1, "GIMP built-in Linear sRGB")),
        scene(),
        "the colours that the profile means, in sRGB",
    )
    yield Case(
        "PNG in 16 bits of linear grey",
        "a.png",
        _with_profile(_linear_grey(), profiles.grey(1)),
        grey_expected(),
        "the greys that the profile means",
    )
    yield Case(
        "PNG whose gAMA and cHRM define its colours",
        "a.png",
        _after_header(_linear8(), _gamma(1), _SRGB_CHROMATICITIES),
        scene(),
        "those colours, in sRGB",
    )
    yield Case(
        "PNG whose cICP defines its colours",
        "a.png",
        _after_header(_in_p3(), _cicp(12, 13)),
        scene(),
        "those colours, in sRGB",
    )
    yield Case(
        "PNG in high dynamic range",
        "a.png",
        _after_header(_pq(), _cicp(9, 16)),
        scene(),
        "the image; values brighter than white paper become white",
    )
    yield Case(
        "PNG with a profile of 1.5 MB",
        "a.png",
        _with_profile(file(scene(), "PNG"), _large_profile()),
        scene(),
        same,
    )
    yield Case(
        "PNG with 2 MB of text",
        "a.png",
        _after_header(file(scene(), "PNG"), _text(2_000_000)),
        scene(),
        same,
    )
    yield Case(
        "PNG, animated",
        "a.png",
        file(scene(), "PNG", save_all=True, append_images=[ImageOps.mirror(scene())]),
        OTHER,
        "a file may contain one image only",
    )
    yield Case("Truncated PNG", "a.png", file(scene(), "PNG")[:-30], BROKEN, "it cannot be decoded")
    yield Case("Decompression bomb", "a.png", _bomb(), LARGE, "its pixels, and the limit")
    yield Case(
        "20,000x1",
        "a.png",
        file(Image.new("RGB", (20_000, 1), SAND), "PNG"),
        LARGE,
        "its sides, and the limit",
    )


def siblings() -> Iterator[Case]:
    yield from _depths()
    yield from _transparent()
    yield from _coloured()
    yield from _strange()


def _depths() -> Iterator[Case]:
    for bits in (1, 2, 4, 8, 16):
        levels = 2**bits - 1
        few = np.round(np.asarray(grey()) / 255 * levels)
        shown = Image.fromarray(np.round(few / levels * 255).astype(np.uint8)).convert("RGB")
        yield _case(f"grey of {bits} bits", png(few.astype(np.uint16), GREY, bits), shown)
        keyed, key = few.copy(), int(few[0, 0])
        keyed[:, SIZE[0] // 2 :] = 1 - key if bits == 1 else key + 1
        keyed = np.where(keyed == key, key, keyed)
        hidden = int(keyed[0, -1])
        picture = Image.fromarray(np.round(keyed / levels * 255).astype(np.uint8))
        yield _case(
            f"grey of {bits} bits with tRNS",
            png(keyed.astype(np.uint16), GREY, bits, chunk(b"tRNS", struct.pack(">H", hidden))),
            with_alpha(
                picture, Image.fromarray(np.where(keyed == hidden, 0, 255).astype(np.uint8))
            ),
        )
        if bits > 8:
            continue
        palette = scene().quantize(min(4, 2**bits))
        colours = np.asarray(palette.convert("RGB"))
        plte = bytes(palette.getpalette() or ()).ljust(12, b"\0")[: 3 * min(4, 2**bits)]
        shown = Image.fromarray(colours)
        indices = np.asarray(palette).astype(np.uint16)
        yield _case(
            f"palette of {bits} bits", png(indices, PALETTE, bits, chunk(b"PLTE", plte)), shown
        )
        first = int(indices[0, 0])
        alphas = bytes(255 if n == first else 40 for n in range(first + 1)) if first else b"\x28"
        alpha = np.array([*alphas, *[255] * 256], np.uint8)[indices]
        yield _case(
            f"palette of {bits} bits with tRNS",
            png(indices, PALETTE, bits, chunk(b"PLTE", plte) + chunk(b"tRNS", alphas)),
            with_alpha(shown, Image.fromarray(alpha)),
        )
    for kind, picture in (
        (RGB, scene()),
        (RGBA, with_alpha(scene())),
        (GREY_ALPHA, with_alpha(grey())),
    ):
        shown = picture
        stored = picture.convert("LA") if kind == GREY_ALPHA else picture
        for bits in (8, 16):
            yield _case(
                f"colour type {kind} of {bits} bits", png(samples(stored, bits), kind, bits), shown
            )
    yield _case("interlaced", png(samples(scene(), 8), RGB, 8, interlaced=True), scene())
    yield _case("interlaced, 16 bits", png(samples(scene()), RGB, 16, interlaced=True), scene())


def _transparent() -> Iterator[Case]:
    yield _case("RGB of 8 bits with tRNS", _keyed(samples(scene(), 8), RGB, 8), with_alpha(scene()))
    yield _case("RGB of 16 bits with tRNS", _keyed(samples(scene()), RGB, 16), with_alpha(scene()))
    near = samples(scene())
    near[:, : SIZE[0] // 2] = np.array(_KEY) + 1  # the high bytes are those of the key
    behind = Image.fromarray((near >> 8).astype(np.uint8))
    near[:, SIZE[0] // 2 :] = _KEY
    data = png(near, RGB, 16, chunk(b"tRNS", struct.pack(">3H", *_KEY)))
    yield _case("RGB of 16 bits, tRNS close to other colours", data, with_alpha(behind))
    half = with_alpha(scene(), half_alpha())
    yield _case("half transparent, 16 bits", png(samples(half), RGBA, 16), half)
    hidden = with_alpha(scene(), Image.new("L", SIZE, 0))
    yield _case("transparent everywhere", file(hidden, "PNG"), hidden)
    opaque = with_alpha(scene(), Image.new("L", SIZE, 255))
    yield _case("alpha that is opaque everywhere", file(opaque, "PNG"), scene())
    la = np.dstack([np.round(linear(grey()) * 65_535), samples(right_half())]).astype(np.uint16)
    data = _with_profile(png(la, GREY_ALPHA, 16), profiles.grey(1))
    yield _case("linear grey of 16 bits with alpha", data, with_alpha(grey()))
    rgba = np.dstack([np.round(linear(scene()) * 65_535), samples(right_half())]).astype(np.uint16)
    data = _with_profile(png(rgba, RGBA, 16), profiles.rgb(1))
    yield _case("linear RGB of 16 bits with alpha", data, with_alpha(scene()))


def _coloured() -> Iterator[Case]:
    plain, linear8 = file(scene(), "PNG"), _linear8()
    swapped = profiles.rgb(2.2, "x", profiles.EXCHANGED)
    for name in ("sRGB IEC61966-2.1", "Linear Rec709 RGB", "GIMP built-in Linear sRGB", ""):
        yield _case(
            f"linear profile named {name!r}", _with_profile(linear8, profiles.rgb(1, name)), scene()
        )
    for mode in ("RGB", "RGBA", "P", "PA"):
        picture = with_alpha(scene(), half_alpha()) if "A" in mode else scene()
        shown = with_alpha(exchanged(), half_alpha()) if "A" in mode else exchanged()
        stored = picture.quantize(16) if mode.startswith("P") else picture
        yield _case(f"{mode} with a profile", _with_profile(file(stored, "PNG"), swapped), shown)
    yield _case(
        "16 bits with a profile",
        _with_profile(png(samples(scene()), RGB, 16), swapped),
        exchanged(),
    )
    linear16 = png(np.round(linear(scene()) * 65_535).astype(np.uint16), RGB, 16)
    yield _case("linear, 16 bits", _with_profile(linear16, profiles.rgb(1)), scene())
    for gamma in (1.0, 1.8, 2.2):
        stored = Image.fromarray(np.round(linear(grey()) ** (1 / gamma) * 255).astype(np.uint8))
        yield _case(
            f"grey of gamma {gamma}",
            _with_profile(file(stored, "PNG"), profiles.grey(gamma)),
            grey_expected(),
        )
        yield _case(
            f"grey of gAMA {gamma}",
            _after_header(file(stored, "PNG"), _gamma(gamma)),
            grey_expected(),
        )
        colours = Image.fromarray(np.round(linear(scene()) ** (1 / gamma) * 255).astype(np.uint8))
        yield _case(
            f"gAMA {gamma} alone", _after_header(file(colours, "PNG"), _gamma(gamma)), scene()
        )
    deep = png(np.round(linear(grey()) * 65_535).astype(np.uint16), GREY, 16)
    yield _case("grey of 16 bits with gAMA 1", _after_header(deep, _gamma(1)), grey_expected())
    yield _case(
        "grey with a profile for RGB",
        _with_profile(file(grey(), "PNG"), profiles.rgb(1.8)),
        grey_expected(),
    )
    yield _case("RGB with a profile for grey", _with_profile(plain, profiles.grey(1)), scene())
    yield _case("RGB with a profile for CMYK", _with_profile(plain, profiles.cmyk()), scene())
    yield _case("a profile that is none", _with_profile(plain, b"no profile"), scene())
    yield _case("a profile cut off", _with_profile(plain, swapped[:300]), scene())
    garbled = chunk(b"iCCP", b"x\0\0" + b"not deflated")
    yield _case("a profile that does not inflate", _after_header(plain, garbled), scene())
    yield _case(
        "a profile of elements", _with_profile(plain, profiles.of_elements(100_000)), scene()
    )
    named = profiles.rgb(2.2, "x", profiles.EXCHANGED, [(b"D2B0", profiles.of_elements(50)[-200:])])
    yield _case("a matrix profile with elements too", _with_profile(plain, named), exchanged())
    yield from _precedence()
    bt2020 = _encoded(_in_primaries(profiles_matrix=_BT2020), lambda v: v ** (1 / 2.2))
    yield _case("cICP of BT.2020 with gamma 2.2", _after_header(bt2020, _cicp(9, 4)), scene())
    yield _case("cICP, linear", _after_header(linear8, _cicp(1, 8)), scene())
    yield _case("cICP of sRGB", _after_header(plain, _cicp(1, 13)), scene())
    for transfer in (1, 6, 14, 15):
        data = _encoded(linear(scene()), _bt709)
        yield _case(
            f"cICP with the transfer of BT.709, {transfer}",
            _after_header(data, _cicp(1, transfer)),
            scene(),
        )
    narrow = Image.fromarray(np.round(16 + np.asarray(scene()) / 255 * 219).astype(np.uint8))
    yield _case(
        "cICP of narrow range", _after_header(file(narrow, "PNG"), _cicp(1, 13, full=0)), scene()
    )
    narrow16 = np.round((16 + np.asarray(scene()) / 255 * 219) * 256).astype(np.uint16)
    yield _case(
        "cICP of narrow range, 16 bits",
        _after_header(png(narrow16, RGB, 16), _cicp(1, 13, full=0)),
        scene(),
    )
    yield _case("cICP, HLG", _after_header(_hlg(), _cicp(9, 18)), scene())
    yield _case("cICP, PQ in 8 bits", _after_header(_pq(8), _cicp(9, 16)), scene())
    grey_p3 = _after_header(file(grey(), "PNG"), _cicp(12, 13))
    yield _case("grey with cICP", grey_p3, grey_expected())
    yield _case("cICP of reserved numbers", _after_header(plain, _cicp(3, 99)), scene())
    yield _case(
        "palette with cICP",
        _after_header(
            file(Image.open(io.BytesIO(_in_p3())).convert("RGB").quantize(16), "PNG"), _cicp(12, 13)
        ),
        scene(),
    )


def _precedence() -> Iterator[Case]:
    """cICP goes before iCCP, that before sRGB, that before gAMA (PNG, third edition, 4.3)."""
    plain, srgb = file(scene(), "PNG"), chunk(b"sRGB", b"\0")
    profile = _iccp(profiles.rgb(2.2, "x", profiles.EXCHANGED))
    yield _case("cICP before iCCP", _after_header(_in_p3(), _cicp(12, 13), profile), scene())
    yield _case("iCCP before sRGB", _after_header(plain, profile, srgb), exchanged())
    yield _case("sRGB before gAMA", _after_header(plain, srgb, _gamma(1)), scene())
    yield _case("iCCP before gAMA", _after_header(plain, profile, _gamma(1)), exchanged())


def _strange() -> Iterator[Case]:
    plain = file(scene(), "PNG")
    wrong = bytearray(chunk(b"tEXt", b"Comment\0x"))
    wrong[-1] ^= 1
    yield _case("a text whose checksum is wrong", _after_header(plain, bytes(wrong)), scene())
    yield _case("20,000 texts", _after_header(plain, chunk(b"tEXt", b"k\0v") * 20_000), scene())
    international = chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))
    yield _case("3 MB of international text", _after_header(plain, international), scene())
    uncompressed = chunk(b"tEXt", b"k\0" + b"v" * 3_000_000)
    yield _case("3 MB of plain text", _after_header(plain, uncompressed), scene())
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000), 9))
    yield _case("a text of 100 MB, compressed", _after_header(plain, bomb), scene())
    for orientation in range(1, 9):
        yield _case(
            f"orientation {orientation}",
            file(turned(scene(), orientation), "PNG", exif=sideways(orientation)),
            scene(),
        )
    yield _case(
        "16 bits, turned",
        png(
            samples(turned(grey(), 6)),
            GREY,
            16,
            chunk(b"eXIf", sideways(6).tobytes().removeprefix(b"Exif\0\0")),
        ),
        grey_expected(),
    )
    broken = chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")
    yield _case("broken EXIF", _after_header(plain, broken), scene())
    parts = png(samples(scene(), 8), RGB, 8, parts=7)
    yield _case("many IDAT chunks", parts, scene())
    yield Case("PNG: no IEND", "a.png", plain[:-12], scene())
    damaged = bytearray(plain)
    damaged[damaged.index(b"IDAT") + 20] ^= 0xFF
    yield Case("PNG: a damaged IDAT", "a.png", bytes(damaged), BROKEN)
    yield Case("PNG: half", "a.png", plain[: len(plain) // 2], BROKEN)
    yield Case("PNG: no IDAT", "a.png", plain[:_BEHIND_IHDR] + plain[-12:], BROKEN)
    yield Case("PNG: half of 16 bits", "a.png", png(samples(scene()), RGB, 16)[:-60], BROKEN)
    yield Case("PNG: too few rows", "a.png", _short(8), BROKEN)
    yield Case("PNG: too few rows of 16 bits", "a.png", _short(16), BROKEN)
    yield Case("PNG: depth 3", "a.png", png(samples(grey(), 8), GREY, 3), BROKEN)


def turned(picture: Image.Image, orientation: int) -> Image.Image:
    """Return the image as a file with that orientation stores it."""
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    return picture.transpose(stored[orientation]) if orientation in stored else picture


def png(
    pixels: NDArray[np.uint16],
    colour_type: int,
    bits: int,
    more: bytes = b"",
    *,
    interlaced: bool = False,
    parts: int = 1,
) -> bytes:
    """Return a PNG of these samples, with `more` chunks between its header and its pixels."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, int(interlaced))
    passes = [pixels]
    if interlaced:
        adam7 = (
            (0, 8, 0, 8),
            (0, 8, 4, 8),
            (4, 8, 0, 4),
            (0, 4, 2, 4),
            (2, 4, 0, 2),
            (0, 2, 1, 2),
            (1, 2, 0, 1),
        )
        passes = [pixels[top::down, left::across] for top, down, left, across in adam7]
    rows = b"".join(b"\0" + _packed(row.reshape(-1), bits) for part in passes for row in part)
    data = zlib.compress(rows)
    step = -(-len(data) // parts)
    idat = b"".join(chunk(b"IDAT", data[n : n + step]) for n in range(0, len(data), step))
    return SIGNATURE + chunk(b"IHDR", header) + more + idat + chunk(b"IEND", b"")


def _packed(row: NDArray[np.uint16], bits: int) -> bytes:
    if bits == 16:
        return row.astype(">u2").tobytes()
    if bits == 8:
        return row.astype(np.uint8).tobytes()
    each = (row[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(each.astype(np.uint8)).tobytes()


def _case(what: str, data: bytes, expected: Image.Image) -> Case:
    return Case(f"PNG: {what}", "a.png", data, expected)


def _after_header(data: bytes, *more: bytes) -> bytes:
    return data[:_BEHIND_IHDR] + b"".join(more) + data[_BEHIND_IHDR:]


def _iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"a profile\0\0" + zlib.compress(profile))


def _with_profile(data: bytes, profile: bytes) -> bytes:
    return _after_header(data, _iccp(profile))


def _gamma(gamma: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(100_000 / gamma)))


def _cicp(primaries: int, transfer: int, full: int = 1) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, 0, full]))


_SRGB_CHROMATICITIES = chunk(
    b"cHRM", struct.pack(">8I", 31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)
)
_BT2020: profiles.Primaries = (
    (0.67348, 0.27904, -0.00194),
    (0.16566, 0.67535, 0.02998),
    (0.12504, 0.04561, 0.79686),
)


def _in_primaries(profiles_matrix: profiles.Primaries) -> NDArray[np.float64]:
    """Convert the scene's light to other primaries."""
    light: NDArray[np.float64] = (
        linear(scene()) @ np.array(profiles.SRGB) @ np.linalg.inv(np.array(profiles_matrix))
    )
    return np.clip(light, 0, 1)


def _encoded(
    light: NDArray[np.float64],
    encode: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    bits: int = 16,
) -> bytes:
    values = np.round(encode(light) * (2**bits - 1)).astype(np.uint16)
    return png(values, RGB, bits)


def _linear8() -> bytes:
    return _encoded(linear(scene()), lambda v: v, 8)


def _linear_grey() -> bytes:
    return png(np.round(linear(grey()) * 65_535).astype(np.uint16), GREY, 16)


def _in_p3() -> bytes:
    return _encoded(_in_primaries(profiles.P3), _srgb_curve, 8)


def _srgb_curve(v: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)


def _bt709(v: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(v < 0.018, 4.5 * v, 1.099 * v**0.45 - 0.099)


def _pq(bits: int = 16) -> bytes:
    """Encode the scene in BT.2020 with PQ and white at 203 cd/m2 (ITU-R BT.2408)."""

    def encode(v: NDArray[np.float64]) -> NDArray[np.float64]:
        y = (v * 203 / 10_000) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)

    return _encoded(_in_primaries(_BT2020), encode, bits)


def _hlg() -> bytes:
    """Encode the scene in HLG for a display of 1,000 cd/m2, white at 203 (ITU-R BT.2100,
    BT.2408)."""
    light = _in_primaries(_BT2020) * 0.203
    luminance = light @ np.array([0.2627, 0.6780, 0.0593])
    scene_light = light * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1)

    def encode(v: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(v <= 1 / 12, np.sqrt(3 * v), a * np.log(np.maximum(12 * v - b, 1e-9)) + c)

    return _encoded(scene_light, encode)


def _keyed(pixels: NDArray[np.uint16], colour_type: int, bits: int) -> bytes:
    key = tuple(k & (2**bits - 1) for k in _KEY)
    keyed = pixels.copy()
    keyed[:, SIZE[0] // 2 :] = key
    return png(keyed, colour_type, bits, chunk(b"tRNS", struct.pack(">3H", *key)))


def _large_profile() -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, 1_500_000, np.uint8).tobytes()
    return profiles.rgb(2.2, "a monitor", extra=((b"LUTx", b"data" + bytes(8) + noise),))


def _text(size: int) -> bytes:
    return chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b'{"id": 1},' * (size // 10)))


def _short(bits: int) -> bytes:
    """Return a complete file whose header claims twice the rows that it has."""
    data = bytearray(png(samples(scene(), bits), RGB, bits))
    header = struct.pack(">IIBBBBB", SIZE[0], 2 * SIZE[1], bits, RGB, 0, 0, 0)
    data[len(SIGNATURE) : _BEHIND_IHDR] = chunk(b"IHDR", header)
    return bytes(data)


def _bomb() -> bytes:
    """Return a PNG of 1 kB whose header claims 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return SIGNATURE + body + chunk(b"IEND", b"")
