"""High dynamic range and wide colours (BT.2100's PQ and HLG, BT.2020) as a display of SDR shows them (BT.709, BT.1886).

Brightness is method C of ITU-R BT.2446-1: in proportion up to 58.5 % of SDR's white, then ever less. A grey card (26
cd/m² in HDR by BT.2408) stays mid grey, 100 cd/m² are 73 % and HDR's reference white of 203 cd/m² 91 % of the light of
SDR's white; from 332 cd/m² on all is white. Colours keep their hue where BT.709 has them, and are cut to it elsewhere.
"""

import functools

import numpy as np
from PIL import ImageFilter

PQ, HLG = 16, 18  # H.273's numbers for transfer characteristics, which are FFmpeg's
BT709, BT2020, P3 = 1, 9, 12  # and for primaries; P3 with daylight's white (D65)

_LUMINANCE = {  # of the primaries' red, green and blue
    BT709: np.array([0.2126, 0.7152, 0.0722]),
    BT2020: np.array([0.2627, 0.6780, 0.0593]),
    P3: np.array([0.2290, 0.6917, 0.0793]),
}
_TO_BT709 = {
    BT709: np.eye(3),
    BT2020: np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]),  # BT.2407
    P3: np.array([[1.2249, -0.2249, 0.0], [-0.0421, 1.0421, 0.0], [-0.0196, -0.0786, 1.0983]]),
}
_SIZE = 65  # places of the table along each colour


@functools.cache
def sdr_table(transfer: int, primaries: int = BT2020) -> ImageFilter.Color3DLUT:
    """What turns RGB pictures of these primaries, with a transfer of `PQ` or `HLG` or else SDR's, into BT.709's SDR.

    Primaries that are not known are taken for BT.2020's, which HDR has.
    """
    primaries = primaries if primaries in _TO_BT709 else BT2020
    weights = _LUMINANCE[primaries]
    signal = np.linspace(0, 1, _SIZE)
    blue, green, red = np.meshgrid(signal, signal, signal, indexing="ij")  # in the table red changes first
    light = _light(np.stack([red, green, blue], axis=-1), transfer, weights)
    if transfer in (PQ, HLG):
        luminance = np.maximum(light @ weights, 1e-6)[..., None]
        light = light * _tone(luminance) / luminance
    shown = np.clip(light @ _TO_BT709[primaries].T / 100, 0, 1) ** (1 / 2.4)
    return ImageFilter.Color3DLUT(_SIZE, shown.astype(np.float32).ravel())


def _light(signal: np.ndarray, transfer: int, weights: np.ndarray) -> np.ndarray:
    """cd/m² of R'G'B' signals 0 … 1, on displays of 10,000 (PQ), 1,000 (HLG) or 100 (SDR): BT.2100, BT.1886.

    `weights` are those of luminance.
    """
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = signal ** (1 / m2)
        return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        return 1000 * scene * (scene @ weights)[..., None] ** 0.2
    return 100 * signal**2.4


def _tone(luminance: np.ndarray) -> np.ndarray:
    """Luminance of SDR, in % of its white, of HDR's in cd/m²."""
    k1, k2, k3, k4 = 0.83802, 15.09968, 0.74204, 78.99439
    knee = 58.5 / k1
    above = k2 * np.log(np.maximum(luminance / knee, 1) - k3) + k4
    return np.where(luminance < knee, k1 * luminance, above)
