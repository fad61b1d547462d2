"""FLOPs of matrix multiplications in HLO, from shapes: dots, and the convolutions that XLA writes for them on TPU."""

from dataclasses import dataclass
import math
import re

from voco_jax.aot.hlo import Computation, Instruction, attribute


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """2 × multiply-adds of a dot or convolution, 0 for all else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    lhs, rhs = (operand.arrays[0] for operand in computation.operands(instruction))
    result = instruction.arrays[0]
    if instruction.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [lhs.dims[int(d)] for d in match[1].split(",") if d] if match else []
        return 2.0 * result.size * math.prod(contracted)
    labels = attribute(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction)
    # Each product is one (row, output feature, input feature of its group) at one valid pair of place and tap.
    total = 2.0 * result.dims[labels[3].index("b")] * rhs.dims[labels[2].index("o")] * rhs.dims[labels[2].index("i")]
    for axis in range(len(labels[1]) - 2):
        size, taps, places = (
            array.dims[label.index(str(axis))] for array, label in zip((lhs, rhs, result), labels.groups(), strict=True)
        )
        total *= _valid_pairs(size, taps, places, _window(instruction, axis))
    return total


@dataclass(frozen=True)
class _Window:
    stride: int = 1
    low: int = 0  # padding before
    base_dilation: int = 1
    dilation: int = 1


def _window(instruction: Instruction, axis: int) -> _Window:
    match = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    text = match[1] if match else ""

    def entry(key: str, default: str) -> str:
        values = re.search(rf"(?:^| ){key}=(\S+)", text)
        return values[1].split("x")[axis] if values else default

    return _Window(
        stride=int(entry("stride", "1")),
        low=int(entry("pad", "0_0").split("_")[0]),
        base_dilation=int(entry("lhs_dilate", "1")),
        dilation=int(entry("rhs_dilate", "1")),
    )


def _valid_pairs(size: int, taps: int, places: int, window: _Window) -> int:
    """(output place, tap) pairs along one axis whose input is an element, not padding nor a hole of its dilation."""
    pairs = 0
    for tap in range(taps):
        offset = tap * window.dilation - window.low
        if window.base_dilation == 1:  # closed: 0 ≤ place · stride + offset < size
            first = max(0, -(offset // window.stride))
            last = min(places - 1, (size - 1 - offset) // window.stride)
            pairs += max(0, last - first + 1)
        else:
            for place in range(places):
                at = place * window.stride + offset
                pairs += at % window.base_dilation == 0 and 0 <= at // window.base_dilation < size
    return pairs
