"""Converts samples of 8 or 16 bits to sRGB with 8 bits.

Matrix profiles, cICP, gAMA and cHRM are computed here. Only profiles with a colour lookup table are
evaluated by Little CMS, after `actors.images.profiles` has rebuilt them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from actors.images import code_points
from actors.images.profiles import Matrix, Table, from_lab, parse, srgb_profile
from actors.images.samples import Array8, Array8or16, Calibration, Cicp, IccProfile, Model, Samples

Floats = NDArray[np.float32]

# Pixels converted at a time; each takes some 60 bytes of temporary memory.
_BAND_PIXELS = 2**19
_DEEP = 65_535
_SRGB_XY = code_points.PRIMARIES[1]  # of BT.709, which sRGB shares
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_LIGHT = np.arange(_DEEP + 1) / _DEEP
# sRGB's code of each of these levels of linear light (IEC 61966-2-1).
_SRGB_TABLE: Array8 = np.round(
    255 * np.where(_LIGHT <= 0.0031308, 12.92 * _LIGHT, 1.055 * _LIGHT ** (1 / 2.4) - 0.055)
).astype(np.uint8)
_NO_OPTIMIZATION = 0x0100  # cmsFLAGS_NOOPTIMIZE: the optimization loses shadows of linear samples


def to_srgb(samples: Samples) -> Array8:
    """Return the picture in sRGB, of shape (height, width, 1 or 3).

    A profile that is broken or for another colour model is ignored, and the samples are taken as
    sRGB. Raises UnsupportedImage for a profile that is too large.
    """
    match samples.model:
        case Model.LAB:
            return _in_bands(samples.values, _lab_to_srgb)
        case Model.CMYK:
            return _cmyk_to_srgb(samples)
        case Model.GREY:
            return _grey_to_srgb(samples)
        case Model.RGB:
            return _rgb_to_srgb(samples)


def to_8_bits(values: Array8or16) -> Array8:
    """Round samples of 16 bits to 8, and return those of 8 bits unchanged."""
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    return _in_bands(
        values,
        lambda band: ((band.astype(np.uint32) * 255 + _DEEP // 2) // _DEEP).astype(np.uint8),
    )


@dataclass(frozen=True, slots=True)
class _Light:
    """Converts RGB samples: a table to linear light for each channel, and a matrix to linear sRGB.

    `luminance` has the weights of R, G and B in HLG's OOTF; None for other transfer functions.
    """

    tables: tuple[Floats, ...]
    matrix: Floats
    luminance: Floats | None = None

    def __call__(self, band: Array8or16) -> Array8:
        light = np.stack(
            [np.take(table, band[..., n]) for n, table in enumerate(self.tables)], axis=-1
        )
        if self.luminance is not None:
            light = code_points.hlg_display_light(light, self.luminance)
        return encode_srgb(light @ self.matrix)


def _rgb_to_srgb(samples: Samples) -> Array8:
    levels = _levels(samples.values)
    match samples.colours:
        case IccProfile(data):
            match parse(data, b"RGB "):
                case Matrix(curves, primaries):
                    tables = tuple(_f32(curve(levels)) for curve in curves)
                    matrix = _f32(primaries @ _xyz_to_srgb())
                    return _converted(samples.values, _Light(tables, matrix))
                case Table(profile):
                    return _by_table(samples.values, profile, "rgb")
        case Cicp() as cicp:
            if (found := _light_of_cicp(cicp, levels)) is not None:
                return _converted(samples.values, found)
        case Calibration(gamma, primaries):
            table = _f32(code_points.srgb(levels) if gamma is None else levels**gamma)
            chosen = _to_srgb_matrix(primaries or _SRGB_XY)
            return _converted(samples.values, _Light((table,) * 3, chosen))
        case None:
            pass
    return to_8_bits(samples.values)


def _grey_to_srgb(samples: Samples) -> Array8:
    levels = _levels(samples.values)
    light: NDArray[np.float64] | None = None
    match samples.colours:
        case IccProfile(data):
            match parse(data, b"GRAY"):
                case Matrix(curves, _):
                    light = curves[0](levels)
                case Table(profile):
                    ramp = np.arange(len(levels), dtype=samples.values.dtype)[None, :, None]
                    shown = _by_table(ramp, profile, "gray")
                    return shown[0, :, 1:2][samples.values[..., 0]]
        case Cicp() as cicp:
            if (found := _light_of_cicp(cicp, levels)) is not None:
                every = np.arange(len(levels), dtype=samples.values.dtype)
                ramp = np.repeat(every[None, :, None], 3, axis=2)
                return found(ramp)[0, :, 1:2][samples.values[..., 0]]
        case Calibration(gamma, _):
            light = None if gamma is None else levels**gamma
        case None:
            pass
    if light is None:
        return to_8_bits(samples.values)
    return encode_srgb(_f32(light))[samples.values]


def _cmyk_to_srgb(samples: Samples) -> Array8:
    if isinstance(samples.colours, IccProfile):
        profile = parse(samples.colours.data, b"CMYK")
        if isinstance(profile, Table):
            return _by_table(samples.values, profile.data, "cmyk")
    return _in_bands(samples.values, _without_press)


def _without_press(band: Array8or16) -> Array8:
    """Convert CMYK without a profile: inks are the complements of sRGB's primaries."""
    inks = 255 - to_8_bits(band).astype(np.uint16)
    return ((inks[..., :3] * inks[..., 3:] + 127) // 255).astype(np.uint8)


def _by_table(values: Array8or16, profile: bytes, space: str) -> Array8:
    def convert(band: Array8or16) -> Array8:
        if space == "gray":
            band = band[..., 0]
        found: Array8 = imagecodecs.cms_transform(
            band,
            profile,
            srgb_profile(),
            colorspace=space,
            outcolorspace="rgb",
            outdtype="uint8",
            flags=_NO_OPTIMIZATION if band.dtype == np.uint16 and space != "cmyk" else 0,
        )
        return found

    return _in_bands(values, convert)


def _converted(values: Array8or16, light: _Light) -> Array8:
    """Convert the samples, or return them unchanged if no colour would change by more than 1/255.

    The check probes a grid of 17 levels a channel and all greys.
    """
    if values.dtype == np.uint8:
        steps = np.linspace(0, 255, 17).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        probes = np.concatenate([cube, greys], axis=1)
        if np.abs(light(probes).astype(int) - probes).max() <= 1:
            return values.astype(np.uint8, copy=False)
    return _in_bands(values, light)


def _light_of_cicp(cicp: Cicp, levels: NDArray[np.float64]) -> _Light | None:
    """Return the conversion, or None for reserved or unspecified code points."""
    transfer = code_points.transfer(cicp.transfer)
    primaries = code_points.PRIMARIES.get(cicp.primaries)
    if transfer is None or primaries is None:
        return None
    if not cicp.full:
        # 16 to 235 of 255, or 4,096 to 60,160 of 65,535 (H.273, 8.3)
        white, black, top = (235, 16, 255) if len(levels) == 256 else (60_160, 4_096, _DEEP)
        levels = np.clip((levels * top - black) / (white - black), 0, 1)
    luminance = None
    if cicp.transfer == code_points.HLG:
        luminance = _f32(_xyz_of(primaries)[:, 1])
    return _Light((_f32(transfer(levels)),) * 3, _to_srgb_matrix(primaries), luminance)


def encode_srgb(light: Floats) -> Array8:
    """Encode linear light as sRGB with 8 bits. Values are clipped to 0 to 1."""
    scaled = np.clip(light, 0, 1) * _DEEP + 0.5
    return _SRGB_TABLE[scaled.astype(np.uint16)]


def _lab_to_srgb(band: Array8or16) -> Array8:
    if band.dtype == np.uint8:
        lightness = _f32(band[..., 0]) * np.float32(100 / 255)
        a_b = band[..., 1:].astype(np.int8).astype(np.float32)
    else:
        lightness = _f32(band[..., 0]) * np.float32(100 / _DEEP)
        a_b = _f32(band[..., 1:].astype(np.int16)) / np.float32(256)
    y = (lightness + 16) / 116
    f = np.stack([y + a_b[..., 0] / 500, y, y - a_b[..., 1] / 200], axis=-1)
    return encode_srgb(_f32(from_lab(f)) @ _f32(_D50[:, None] * _xyz_to_srgb()))


def _in_bands(values: Array8or16, convert: Callable[[Array8or16], Array8]) -> Array8:
    """Apply `convert` to bands of rows, to limit the memory for intermediate floats."""
    height, width = values.shape[:2]
    step = max(1, _BAND_PIXELS // max(width, 1))
    first = convert(values[:step])
    result = np.empty((height, *first.shape[1:]), np.uint8)
    result[:step] = first
    for top in range(step, height, step):
        result[top : top + step] = convert(values[top : top + step])
    return result


def _levels(values: Array8or16) -> NDArray[np.float64]:
    """Return all possible sample values, scaled to 0 to 1."""
    return np.linspace(0, 1, 256 if values.dtype == np.uint8 else _DEEP + 1)


def _to_srgb_matrix(primaries: tuple[float, ...]) -> Floats:
    return _f32(_xyz_of(primaries) @ np.linalg.inv(_xyz_of(_SRGB_XY)))


def _xyz_to_srgb() -> NDArray[np.float64]:
    """Return the matrix from XYZ under D50, the connection space of profiles, to linear sRGB."""
    return np.linalg.inv(_xyz_of(_SRGB_XY)).astype(np.float64)


def _xyz_of(primaries: tuple[float, ...]) -> NDArray[np.float64]:
    """Return XYZ under D50 of R, G and B as rows, adapted by Bradford's matrix.

    `primaries` are x and y of white, R, G and B.
    """
    xy = np.array(primaries).reshape(4, 2)
    xyz = np.column_stack([xy[:, 0] / xy[:, 1], np.ones(4), (1 - xy.sum(axis=1)) / xy[:, 1]])
    white, rows = xyz[0], xyz[1:]
    rows = rows * np.linalg.solve(rows.T, white)[:, None]
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    adapted: NDArray[np.float64] = rows @ (np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD).T
    return adapted


def _f32(values: NDArray[Any]) -> Floats:
    return np.ascontiguousarray(values, dtype=np.float32)
