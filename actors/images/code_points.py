"""Primaries and transfer functions of the coding-independent code points (ITU-T H.273).

Linear light of 1 is reference white: 203 cd/m2 for the HDR curves (ITU-R BT.2408).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats64 = NDArray[np.float64]
HLG = 18
_PQ = 16
_D65 = (0.3127, 0.3290)
_C = (0.310, 0.316)
_DCI = (0.314, 0.351)
_WHITE_CD_M2 = 203
_HLG_DISPLAY_CD_M2, _HLG_GAMMA = 1_000, 1.2

# x and y of white, R, G and B (H.273, table 2).
PRIMARIES: dict[int, tuple[float, ...]] = {
    1: (*_D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060),
    4: (*_C, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    8: (*_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (*_DCI, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}


def transfer(number: int) -> Callable[[Floats64], Floats64] | None:
    """Return the function from samples (0 to 1) to linear light, or None for an unknown number.

    The numbers are those of H.273, table 3.
    """
    return _TRANSFERS.get(number)


def srgb(v: Floats64) -> Floats64:
    """Return the linear light of sRGB samples, 0 to 1 (IEC 61966-2-1)."""
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def hlg_display_light(
    light: NDArray[np.float32], luminance: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Apply HLG's OOTF: scene light to display light (BT.2100, table 5)."""
    y = np.maximum(light @ luminance, 1e-9)[..., None]
    scale = np.float32(_HLG_DISPLAY_CD_M2 / _WHITE_CD_M2)
    shown: NDArray[np.float32] = light * y ** np.float32(_HLG_GAMMA - 1) * scale
    return shown.astype(np.float32, copy=False)


def _bt709(v: Floats64) -> Floats64:
    return np.where(v < 4.5 * 0.018, v / 4.5, ((v + 0.099) / 1.099) ** (1 / 0.45))


def _smpte240(v: Floats64) -> Floats64:
    return np.where(v < 4 * 0.0228, v / 4, ((v + 0.1115) / 1.1115) ** (1 / 0.45))


def _pq(v: Floats64) -> Floats64:
    power = v ** (32 / 2523)
    light = np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)
    return light ** (16384 / 2610) * (10_000 / _WHITE_CD_M2)


def _hlg(v: Floats64) -> Floats64:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(v <= 0.5, v**2 / 3, (np.exp((v - c) / a) + b) / 12)


def _power(gamma: float) -> Callable[[Floats64], Floats64]:
    return lambda v: v**gamma


_TRANSFERS: dict[int, Callable[[Floats64], Floats64]] = {
    **dict.fromkeys((1, 6, 14, 15), _bt709),
    4: _power(2.2),
    5: _power(2.8),
    7: _smpte240,
    8: _power(1),
    13: srgb,
    _PQ: _pq,
    17: lambda v: v**2.6 * (52.37 / 48),
    HLG: _hlg,
}
