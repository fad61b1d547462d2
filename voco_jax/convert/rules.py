"""Which tensor of a PyTorch checkpoint is which parameter of ours: a rule for each, read in both directions.

The rules stand with their families (`families/`), and are listed together in `families/__init__.py`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np

from voco_jax.convert.tensors import transpose


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a tensor of theirs becomes a parameter of ours (one layer of it), and back. Shapes are given as ours."""

    their_shape: Callable[[Sequence[int]], tuple[int, ...]]  # of the shape of ours
    to_ours: Callable[[np.ndarray, Sequence[int]], np.ndarray]  # of theirs, and the shape of ours
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _kernel(num_inputs: int) -> Transform:
    """PyTorch's [outputs, inputs] and our [inputs, outputs], in which heads and head size are two axes."""

    def their_shape(ours):
        return math.prod(ours[num_inputs:]), math.prod(ours[:num_inputs])

    def to_theirs(ours):
        return transpose(ours.reshape(their_shape(ours.shape)[::-1]))

    return Transform(their_shape, lambda theirs, shape: transpose(theirs).reshape(shape), to_theirs)


def _patches() -> Transform:
    """A convolution's [outputs, 3, row, column] and our [row · column · 3, outputs]."""

    def their_shape(ours):
        size = math.isqrt(ours[0] // 3)
        return ours[1], 3, size, size

    def to_ours(theirs, shape):
        return np.ascontiguousarray(theirs.transpose(2, 3, 1, 0)).reshape(shape)

    def to_theirs(ours):
        outputs, channels, rows, columns = their_shape(ours.shape)
        return np.ascontiguousarray(ours.reshape(rows, columns, channels, outputs).transpose(3, 2, 0, 1))

    return Transform(their_shape, to_ours, to_theirs)


COPY = Transform(tuple, lambda theirs, shape: theirs, lambda ours: ours)  # embeddings and norms
HEAD_BIAS = Transform(  # [heads · head size] and our [heads, head size]
    lambda ours: (math.prod(ours),), lambda theirs, shape: theirs.reshape(shape), lambda ours: ours.reshape(-1)
)
KERNEL, FROM_HEADS, PATCHES = _kernel(num_inputs=1), _kernel(num_inputs=2), _patches()


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter and the tensor (or one tensor a layer) that it comes from.

    `ours`: the parameter's path. `theirs`: the tensor's name after the prefix that a format puts before all names of
    this part ('llm', 'head', 'projector' or 'vision'); `{}` is the layer's number: our layers are stacked, [layers, …].
    """

    ours: str
    part: str
    theirs: str
    transform: Transform

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs
