"""TIFFs of every photometric interpretation, depth, layout and compression that scanners write."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from tests.corpus import profiles
from tests.corpus.pngs import turned
from tests.corpus.scenes import (
    BROKEN,
    LARGE,
    OTHER,
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
from tests.support.pictures import file


def documented() -> Iterator[Case]:
    same, eight = "the image", "the image, in 8 bits"
    yield Case("TIFF", "a.tif", file(scene(), "TIFF", compression="tiff_lzw"), scene(), same)
    yield Case("TIFF of 16 bits", "a.tif", tiff(samples(scene())), scene(), eight)
    yield Case("TIFF of 12 bits", "a.tif", packed(12), grey_expected(), eight)
    yield Case(
        "TIFF in which white is 0",
        "a.tif",
        tiff(65_535 - samples(grey()), photometric="miniswhite"),
        grey_expected(),
        same,
    )
    yield Case(
        "TIFF with transparency",
        "a.tif",
        _rgba(16),
        with_alpha(scene()),
        "the image, as transparent as it was",
    )
    yield Case(
        "TIFF with infrared beside its colours",
        "a.tif",
        _rgba(16, "unspecified"),
        scene(),
        "the colours",
    )
    yield Case(
        "TIFF in CMYK with an alpha channel",
        "a.tif",
        _cmyk_alpha(),
        scene(),
        "the image, in RGB and opaque: the alpha is a mask for the press",
    )
    yield Case("TIFF in CIELab", "a.tif", file(_lab(), "TIFF"), scene(), "the image, in RGB")
    yield Case(
        "TIFF in 16 bits of linear grey",
        "a.tif",
        _linear_grey(),
        grey_expected(),
        "the greys that the profile means",
    )
    yield Case("BigTIFF", "a.tif", tiff(np.asarray(scene()), bigtiff=True), scene(), same)
    yield Case(
        "TIFF with a thumbnail",
        "a.tif",
        with_thumbnail(),
        scene(),
        "the image, not its thumbnail",
    )
    yield Case("TIFF with many pages", "a.tif", pages(), OTHER, "a file may contain one image only")
    yield Case(
        "TIFF in 32 bits",
        "a.tif",
        tiff(np.asarray(scene()).astype(np.float32) / 255),
        OTHER,
        "black and white are not defined in it",
    )


def siblings() -> Iterator[Case]:
    yield from _depths()
    yield from _layouts()
    yield from _transparent()
    yield from _coloured()
    yield from _pages()
    yield from _strange()


def _depths() -> Iterator[Case]:
    for bits in (1, 2, 4, 6, 8, 10, 12, 14, 16):
        levels = 2**bits - 1
        few = np.round(np.asarray(grey()) / 255 * levels) / levels * 255
        shown = Image.fromarray(np.round(few).astype(np.uint8)).convert("RGB")
        yield _case(f"grey of {bits} bits", packed(bits), shown)
        yield _case(f"grey of {bits} bits, white is 0", packed(bits, 0), shown)
    for bits in (8, 10, 12, 14, 16):
        yield _case(f"RGB of {bits} bits", packed(bits, 2, scene()), scene())
    for dtype in (np.float16, np.float32, np.float64, np.uint32, np.int16, np.int8):
        yield Case(
            f"TIFF: samples of {dtype.__name__}",
            "a.tif",
            tiff(np.asarray(grey()).astype(dtype), photometric="minisblack"),
            OTHER,
        )
    for bits in (1, 4, 8):
        palette = scene().quantize(min(4, 2**bits)) if bits < 8 else scene().quantize(200)
        data = _palette(palette, bits)
        yield _case(f"palette of {bits} bits", data, palette.convert("RGB"))
    yield _case("CMYK", file(scene().convert("CMYK"), "TIFF"), scene())
    inks = np.asarray(scene().convert("CMYK")).astype(np.uint16) * 257
    yield _case("CMYK of 16 bits", tiff(inks, photometric="separated"), scene())
    yield _case(
        "CMYK, planar",
        tiff(np.moveaxis(inks, 2, 0), photometric="separated", planarconfig="separate"),
        scene(),
    )
    yield _case(
        "CMYK, deflated",
        tiff(np.asarray(scene().convert("CMYK")), photometric="separated", compression="zlib"),
        scene(),
    )
    lab16 = _cielab16()
    yield _case("CIELab of 16 bits", tiff(lab16, photometric="cielab"), scene())
    icc = np.asarray(_lab()).astype(np.int16)
    icc[..., 1:] = (icc[..., 1:] + 128) % 256  # ICCLab's a* and b* are unsigned.
    yield _case("ICCLab", tiff(icc.astype(np.uint8), photometric="icclab"), scene())
    yield _case(
        "CIELab with alpha",
        tiff(
            np.dstack([np.asarray(_lab()), np.asarray(right_half())]),
            photometric="cielab",
            extrasamples=["unassalpha"],
        ),
        with_alpha(scene()),
    )


def _layouts() -> Iterator[Case]:
    for byteorder in "<>":
        yield _case(f"16 bits, {byteorder}", tiff(samples(scene()), byteorder=byteorder), scene())
        yield _case(
            f"grey of 16 bits, {byteorder}, bigtiff",
            tiff(samples(grey()), photometric="minisblack", byteorder=byteorder, bigtiff=True),
            grey_expected(),
        )
    for bits in (8, 16):
        planes = np.moveaxis(samples(scene(), bits).astype(f"u{bits // 8}"), 2, 0)
        yield _case(f"planar, {bits} bits", tiff(planes, planarconfig="separate"), scene())
        yield _case(
            f"planar, {bits} bits, tiled, LZW",
            tiff(planes, planarconfig="separate", tile=(16, 32), compression="lzw", predictor=True),
            scene(),
        )
        for compression in (
            "lzw",
            "zlib",
            "zstd",
            "packbits",
            "lzma",
            "webp",
            "png",
            "jpegxl",
            "jpeg2000",
        ):
            if compression == "webp" and bits == 16:
                continue  # which has 8 bits
            options: dict[str, Any] = {"compression": compression}
            if compression in {"lzw", "zlib", "zstd"}:
                options["predictor"] = True
            stored = samples(scene(), bits).astype(f"u{bits // 8}")
            data = tiff(stored, **options)
            if compression in {"png", "jpegxl", "jpeg2000", "lzma"}:  # none of them is common
                yield Case(f"TIFF: {bits} bits, {compression}", "a.tif", data, OTHER)
            else:
                yield _case(f"{bits} bits, {compression}", data, scene())
    yield _case("tiled", tiff(np.asarray(scene()), tile=(32, 32)), scene())
    yield _case("a row in each strip", tiff(np.asarray(scene()), rowsperstrip=1), scene())
    yield _case("JPEG in it", file(scene(), "TIFF", compression="jpeg", quality=95), scene())
    yield _case(
        "JPEG in it, grey", file(grey(), "TIFF", compression="jpeg", quality=95), grey_expected()
    )
    yield _case(
        "JPEG in it, YCbCr",
        tiff(
            np.asarray(scene()),
            photometric="rgb",
            compression="jpeg",
            subsampling=(2, 2),
            compressionargs={"outcolorspace": "YCBCR"},
        ),
        scene(),
    )
    yield _case(
        "JPEG in it, tiled",
        tiff(
            np.asarray(scene()),
            compression="jpeg",
            tile=(16, 16),
            compressionargs={"outcolorspace": "YCBCR"},
        ),
        scene(),
    )
    for down, across in ((1, 1), (1, 2), (2, 2)):
        yield _case(f"YCbCr, subsampled {across}x{down}", _ycbcr(across, down), scene())
    black_white = grey().convert("1", dither=Image.Dither.NONE)
    for compression in ("group3", "group4", "tiff_ccitt", "packbits", "tiff_lzw"):
        yield _case(
            f"1 bit, {compression}",
            file(black_white, "TIFF", compression=compression),
            black_white.convert("RGB"),
        )
    for fill in (1, 2):
        yield _case(f"1 bit, FillOrder {fill}", _fill_order(fill), black_white.convert("RGB"))
    for orientation in range(1, 9):
        stored = np.asarray(turned(scene(), orientation))
        data = tiff(stored, extratags=[(274, 3, 1, orientation, True)])
        yield _case(f"orientation {orientation}", data, scene())
    stored16 = samples(turned(grey(), 6))
    data = tiff(stored16, byteorder=">", photometric="minisblack", extratags=[(274, 3, 1, 6, True)])
    yield _case("16 bits of grey, turned", data, grey_expected())


def _transparent() -> Iterator[Case]:
    for bits in (8, 16):
        yield _case(f"RGBA of {bits} bits", _rgba(bits), with_alpha(scene()))
        yield _case(f"RGB and infrared of {bits} bits", _rgba(bits, "unspecified"), scene())
        half = with_alpha(scene(), half_alpha())
        yield _case(f"premultiplied RGBA of {bits} bits", _premultiplied(scene(), bits), half)
        yield _case(
            f"premultiplied grey of {bits} bits",
            _premultiplied(grey(), bits),
            with_alpha(grey(), half_alpha()),
        )
        la = np.dstack([samples(grey(), bits), samples(right_half(), bits)]).astype(f"u{bits // 8}")
        yield _case(
            f"grey with alpha, {bits} bits",
            tiff(la, photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig"),
            with_alpha(grey()),
        )
        white = la.copy()
        white[..., 0] = 2**bits - 1 - white[..., 0]
        yield _case(
            f"grey with alpha, white is 0, {bits} bits",
            tiff(
                white, photometric="miniswhite", extrasamples=["unassalpha"], planarconfig="contig"
            ),
            with_alpha(grey()),
        )
        planes = np.moveaxis(samples(with_alpha(scene()), bits).astype(f"u{bits // 8}"), 2, 0)
        yield _case(
            f"planar RGBA of {bits} bits",
            tiff(planes, photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"]),
            with_alpha(scene()),
        )
    both = np.dstack(
        [np.asarray(scene()), np.full((SIZE[1], SIZE[0]), 9), np.asarray(right_half())]
    ).astype(np.uint8)
    yield _case(
        "infrared, then alpha",
        tiff(both, photometric="rgb", extrasamples=["unspecified", "unassalpha"]),
        with_alpha(scene()),
    )
    grey_ir = np.dstack([samples(grey()), samples(right_half())])
    yield _case(
        "grey and infrared",
        tiff(
            grey_ir, photometric="minisblack", extrasamples=["unspecified"], planarconfig="contig"
        ),
        grey_expected(),
    )


def _coloured() -> Iterator[Case]:
    swapped = profiles.rgb(2.2, "x", profiles.EXCHANGED)
    for bits in (8, 16):
        stored = samples(scene(), bits).astype(f"u{bits // 8}")
        yield _case(
            f"RGB of {bits} bits with a profile", tiff(stored, iccprofile=swapped), exchanged()
        )
        light = np.round(linear(scene()) * (2**bits - 1)).astype(f"u{bits // 8}")
        yield _case(f"linear RGB of {bits} bits", tiff(light, iccprofile=profiles.rgb(1)), scene())
        rgba = np.dstack([light, samples(right_half(), bits).astype(f"u{bits // 8}")])
        yield _case(
            f"linear RGBA of {bits} bits",
            tiff(rgba, photometric="rgb", extrasamples=["unassalpha"], iccprofile=profiles.rgb(1)),
            with_alpha(scene()),
        )
        inks = np.asarray(scene().convert("CMYK"))[..., [1, 0, 2, 3]]
        data = tiff(
            (inks.astype(np.uint16) * 257) if bits == 16 else inks,
            photometric="separated",
            iccprofile=profiles.cmyk(exchange=True),
        )
        yield _case(f"CMYK of {bits} bits with its profile", data, scene())
    white = 65_535 - np.round(linear(grey()) * 65_535).astype(np.uint16)
    yield _case(
        "linear grey, white is 0",
        tiff(white, photometric="miniswhite", iccprofile=profiles.grey(1)),
        grey_expected(),
    )
    palette = scene().quantize(16)
    yield _case("palette with a profile", file(palette, "TIFF", icc_profile=swapped), exchanged())
    yield _case(
        "a profile that is none", tiff(np.asarray(scene()), iccprofile=b"none" * 40), scene()
    )


def _pages() -> Iterator[Case]:
    yield _case("the thumbnail first", with_thumbnail(first=True), scene())
    yield _case("a thumbnail in a SubIFD", _with_subifd(scene(), scene().resize((16, 12))), scene())
    yield _case(
        "the photo in a SubIFD",
        _with_subifd(scene().resize((16, 12)), scene(), thumbnail_first=True),
        scene(),
    )
    yield _case("a mask as the second page", _second(subfiletype=4), scene())
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(np.asarray(scene()), photometric="rgb")
        for size in ((32, 24), (16, 12), (8, 6)):
            writer.write(np.asarray(scene().resize(size)), photometric="rgb", subfiletype=1)
    yield _case("a pyramid", out.getvalue(), scene())
    yield Case("TIFF: two pages by SubfileType 2", "a.tif", _second(subfiletype=2), OTHER)
    yield Case("TIFF: 2,000 pages", "a.tif", pages(2_000), OTHER)
    yield Case("TIFF: only a thumbnail", "a.tif", tiff(np.asarray(scene()), subfiletype=1), scene())


def _strange() -> Iterator[Case]:
    plain = tiff(np.asarray(scene()))
    yield Case("TIFF: half", "a.tif", plain[: len(plain) // 2], BROKEN)
    squeezed = tiff(np.asarray(scene()), compression="zlib", rowsperstrip=48)
    yield Case("TIFF: deflated, half", "a.tif", squeezed[:-60], BROKEN)
    yield Case("TIFF: a directory that is its own next", "a.tif", _loop(), scene())
    yield Case(
        "TIFF: a tile of 100,000 pixels a side",
        "a.tif",
        _retagged({322: 100_000, 323: 100_000, 324: 8, 325: 100}),
        LARGE,
    )
    yield Case("TIFF: 1,000,000 pixels wide", "a.tif", _retagged({256: 1_000_000}), LARGE)
    yield Case("TIFF: no width", "a.tif", _retagged({256: None}), BROKEN)
    yield Case("TIFF: strips beyond its end", "a.tif", _retagged({273: 2**31}), BROKEN)
    yield Case("TIFF: a strip that is too short", "a.tif", _retagged({279: 10}), BROKEN)
    yield Case("TIFF: 60,000 samples a pixel", "a.tif", _retagged({277: 60_000}), OTHER)
    yield Case("TIFF: 5 samples of no meaning", "a.tif", _retagged({262: 32_844}), OTHER)
    yield Case("TIFF: an unknown compression", "a.tif", _retagged({259: 4_711}), OTHER)
    yield Case("TIFF: the camera's own data (DNG)", "a.dng", _retagged({262: 32_803}), OTHER)


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    out = io.BytesIO()
    if "photometric" not in options:
        options["photometric"] = "rgb"
    tifffile.imwrite(out, pixels, metadata=None, **options)
    return out.getvalue()


def packed(bits: int, photometric: int = 1, picture: Image.Image | None = None) -> bytes:
    """Return the samples as one strip with `bits` bits each and no gaps within a row."""
    values = samples(picture or grey(), bits)
    if photometric == 0:
        values = 2**bits - 1 - values
    count = 1 if values.ndim == 2 else values.shape[2]
    if bits == 16:
        strip = values.astype("<u2").tobytes()
    else:
        each = (values.reshape(SIZE[1], -1, 1) >> np.arange(bits - 1, -1, -1)) & 1
        strip = np.packbits(each.reshape(SIZE[1], -1).astype(np.uint8), axis=1).tobytes()
    return raw({258: (bits,) * count, 262: photometric, 277: count}, strip)


def raw(tags: Mapping[int, int | tuple[int, ...]], strip: bytes) -> bytes:
    """Return a TIFF of one strip, followed by its directory."""
    every: dict[int, int | tuple[int, ...]] = {
        256: SIZE[0],
        257: SIZE[1],
        259: 1,
        273: 8,
        278: SIZE[1],
        279: len(strip),
        **tags,
    }
    strip += bytes(len(strip) % 2)
    start = 8 + len(strip)
    beyond, entries, more = start + 2 + 12 * len(every) + 4, b"", b""
    for tag in sorted(every):
        value = every[tag]
        if isinstance(value, int):
            entries += struct.pack("<HHII", tag, 4, 1, value)
        else:
            content = struct.pack(f"<{len(value)}H", *value)
            if len(content) <= 4:
                entries += struct.pack("<HHI", tag, 3, len(value)) + content.ljust(4, b"\0")
            else:
                entries += struct.pack("<HHII", tag, 3, len(value), beyond + len(more))
                more += content
    directory = struct.pack("<H", len(every)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", start) + strip + directory + more


def _retagged(changes: Mapping[int, int | None]) -> bytes:
    tags: dict[int, Any] = {258: 8, 262: 1, 277: 1}
    pixels = np.asarray(grey()).tobytes()
    tags = {
        256: SIZE[0],
        257: SIZE[1],
        259: 1,
        273: 8,
        278: SIZE[1],
        279: len(pixels),
        **tags,
        **changes,
    }
    missing = [tag for tag, value in tags.items() if value is None]
    data = raw({tag: value for tag, value in tags.items() if value is not None}, pixels)
    for tag in missing:
        data = data.replace(struct.pack("<HHI", tag, 4, 1), struct.pack("<HHI", 60_000, 4, 1))
    return data


def with_thumbnail(*, first: bool = False) -> bytes:
    out, photo, small = io.BytesIO(), np.asarray(scene()), np.asarray(scene().resize((16, 12)))
    order = [(small, 1), (photo, 0)] if first else [(photo, 0), (small, 1)]
    with tifffile.TiffWriter(out) as writer:
        for picture, kind in order:
            writer.write(picture, photometric="rgb", subfiletype=kind)
    return out.getvalue()


def pages(count: int = 2) -> bytes:
    return file(
        scene(), "TIFF", save_all=True, append_images=[ImageOps.mirror(scene())] * (count - 1)
    )


def _second(subfiletype: int) -> bytes:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(np.asarray(scene()), photometric="rgb")
        mask = np.asarray(right_half()) > 0
        writer.write(
            mask, photometric="mask" if subfiletype == 4 else "minisblack", subfiletype=subfiletype
        )
    return out.getvalue()


def _with_subifd(main: Image.Image, sub: Image.Image, *, thumbnail_first: bool = False) -> bytes:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        kind = int(thumbnail_first)
        writer.write(np.asarray(main), photometric="rgb", subifds=1, subfiletype=kind)
        writer.write(np.asarray(sub), photometric="rgb", subfiletype=1 - kind)
    return out.getvalue()


def _loop() -> bytes:
    data = bytearray(raw({262: 2, 277: 3, 258: (8, 8, 8)}, np.asarray(scene()).tobytes()))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    return bytes(data)


def _rgba(bits: int, extra: str = "unassalpha") -> bytes:
    stored = samples(with_alpha(scene()), bits).astype(f"u{bits // 8}")
    return tiff(stored, photometric="rgb", extrasamples=[extra])


def _premultiplied(picture: Image.Image, bits: int) -> bytes:
    alpha = np.asarray(half_alpha()) / 255
    colours = np.atleast_3d(np.asarray(picture)) / 255 * alpha[..., None]
    stored = np.round(np.dstack([colours, alpha]) * (2**bits - 1)).astype(f"u{bits // 8}")
    photometric = "rgb" if picture.mode == "RGB" else "minisblack"
    return tiff(stored, photometric=photometric, extrasamples=["assocalpha"], planarconfig="contig")


def _cmyk_alpha() -> bytes:
    stored = np.dstack([np.asarray(scene().convert("CMYK")), np.asarray(right_half())])
    return tiff(stored, photometric="separated", extrasamples=["unassalpha"], planarconfig="contig")


def _lab() -> Image.Image:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    result = ImageCms.applyTransform(scene(), transform)
    assert result is not None
    return result


def _cielab16() -> NDArray[np.uint16]:
    eight = np.asarray(_lab()).astype(np.int16)
    a_b = np.where(eight[..., 1:] > 127, eight[..., 1:] - 256, eight[..., 1:]) * 256
    lightness = np.round(eight[..., :1] / 255 * 65_535).astype(np.int64)
    return np.dstack([lightness, a_b.astype(np.int64) % 65_536]).astype(np.uint16)


def _linear_grey() -> bytes:
    light = np.round(linear(grey()) * 65_535).astype(np.uint16)
    return tiff(light, photometric="minisblack", iccprofile=profiles.grey(1))


def _palette(picture: Image.Image, bits: int) -> bytes:
    colours = np.zeros((2**bits, 3), np.uint16)
    listed = np.array(picture.getpalette()).reshape(-1, 3)[: 2**bits]
    colours[: len(listed)] = listed * 257
    indices = np.asarray(picture)
    each = (indices.reshape(SIZE[1], -1, 1) >> np.arange(bits - 1, -1, -1)) & 1
    strip = np.packbits(each.reshape(SIZE[1], -1).astype(np.uint8), axis=1).tobytes()
    return raw({258: bits, 262: 3, 277: 1, 320: tuple(colours.T.reshape(-1).tolist())}, strip)


def _ycbcr(across: int, down: int) -> bytes:
    """Return YCbCr without JPEG, in units of across x down Y samples, then Cb and Cr (TIFF 6.0,
    21)."""
    y, cb, cr = (np.asarray(band) for band in scene().convert("YCbCr").split())
    strip = b""
    for top in range(0, SIZE[1], down):
        for left in range(0, SIZE[0], across):
            unit = y[top : top + down, left : left + across].tobytes()
            strip += unit + bytes([cb[top, left], cr[top, left]])
    return raw({258: (8, 8, 8), 262: 6, 277: 3, 530: (across, down)}, strip)


def _fill_order(order: int) -> bytes:
    bits = np.packbits(
        np.asarray(grey().convert("1", dither=Image.Dither.NONE)),
        axis=1,
        bitorder="big" if order == 1 else "little",
    )
    return raw({258: 1, 262: 1, 266: order, 277: 1}, bits.tobytes())


def _case(what: str, data: bytes, expected: Image.Image) -> Case:
    return Case(f"TIFF: {what}", "a.tif", data, expected)
