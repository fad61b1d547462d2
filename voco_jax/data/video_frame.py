"""A decoded frame as the picture that a person is shown: its colours, its shape, the way it stands."""

from fractions import Fraction

import numpy as np
from PIL import Image

from voco_jax.data.hdr import BT2020, HLG, PQ, sdr_table

# What turns a frame upright, by the signs of a, b, c, d of its display matrix (x' = a x + c y, y' = b x + d y).
TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # these angles are anticlockwise
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def to_picture(frame, aspect: Fraction = Fraction(1)) -> Image.Image:
    """A frame in RGB of 8 bits, upright, the transparent in white; `aspect` is how much wider than high its pixels are.

    Colours are FFmpeg's: by the frame's matrix and range, and where it names none, BT.601 and limited range. HDR and
    BT.2020 become SDR's BT.709 (`hdr.py`).
    """
    from av.video.reformatter import Interpolation

    components = frame.format.components
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in components)
    settings: dict = {"format": "rgba" if has_alpha else "rgb24", "threads": 1}
    if aspect != 1:
        settings |= {"width": max(1, round(frame.width * aspect)), "interpolation": Interpolation.BICUBIC}
    if max(component.bits for component in components) > 8:  # whose last bits swscale's short ways lose
        way = settings.get("interpolation", Interpolation.BILINEAR)
        settings["interpolation"] = way | Interpolation.FULL_CHR_H_INT
    frame_of_rgb = frame.reformat(**settings)
    image = Image.fromarray(frame_of_rgb.to_ndarray()) if has_alpha else frame_of_rgb.to_image(threads=1)
    transfer = int(frame.color_trc) if frame.color_trc in (PQ, HLG) else 0
    if transfer or frame.color_primaries == BT2020:
        image = image.filter(sdr_table(transfer, int(frame.color_primaries)))
    if has_alpha:
        layer, image = image, Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer)
    turn = _turn(frame)
    return image if turn is None else image.transpose(turn)


def _turn(frame) -> Image.Transpose | None:
    from av.sidedata.sidedata import SideDataContainer

    # Not `frame.side_data`, which the frame would keep, and it the frame: both would stay, pixels and all, until Python
    # looks for cycles, which it rarely does where few objects are made.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # which its stub leaves out
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(matrix), "=i4")[:5] / 65536
    return TURNS.get(tuple(int(v) for v in np.sign(np.round([a, b, c, d]))))  # type: ignore[arg-type]  # of 4
