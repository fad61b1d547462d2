"""Which tensor of a PyTorch checkpoint is which parameter of ours: a rule for each, read in both directions.

The rules stand with their families (`families/`), and are listed together in `formats.py`.
"""

import abc
from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from voco_jax.convert.tensors import transpose


class Transform(abc.ABC):
    """From a tensor of theirs to a parameter of ours (one layer of it) and back, given the shape of ours."""

    @abc.abstractmethod
    def their_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """Shape of theirs."""

    @abc.abstractmethod
    def to_ours(self, theirs: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Theirs in the shape of ours."""

    @abc.abstractmethod
    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""


class Copy(Transform):
    """Embeddings and norms, as they are."""

    def their_shape(self, ours):
        return tuple(ours)

    def to_ours(self, theirs, shape):
        return theirs

    def to_theirs(self, ours):
        return ours


class HeadBias(Transform):
    """[heads · head size] and [heads, head size]."""

    def their_shape(self, ours):
        return (math.prod(ours),)

    def to_ours(self, theirs, shape):
        return theirs.reshape(shape)

    def to_theirs(self, ours):
        return ours.reshape(-1)


class Kernel(Transform):
    """PyTorch's [outputs, inputs] and our [inputs, outputs]; heads and head size are two axes with us."""

    def __init__(self, num_inputs: int = 1):
        self._num_inputs = num_inputs

    def their_shape(self, ours):
        n = self._num_inputs
        return math.prod(ours[n:]), math.prod(ours[:n])

    def to_ours(self, theirs, shape):
        return transpose(theirs).reshape(shape)

    def to_theirs(self, ours):
        outputs, inputs = self.their_shape(ours.shape)
        return transpose(ours.reshape(inputs, outputs))


class Patches(Transform):
    """A convolution's [outputs, 3, row, column] and our [row · column · 3, outputs]."""

    def their_shape(self, ours):
        size = math.isqrt(ours[0] // 3)
        return ours[1], 3, size, size

    def to_ours(self, theirs, shape):
        return np.ascontiguousarray(theirs.transpose(2, 3, 1, 0)).reshape(shape)

    def to_theirs(self, ours):
        outputs, channels, rows, columns = self.their_shape(ours.shape)
        return np.ascontiguousarray(ours.reshape(rows, columns, channels, outputs).transpose(3, 2, 0, 1))


COPY, HEAD_BIAS, KERNEL, FROM_HEADS, PATCHES = Copy(), HeadBias(), Kernel(), Kernel(num_inputs=2), Patches()


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter and the tensor (or one tensor a layer) that it comes from.

    `ours`: the parameter's path. `theirs`: the tensor's name behind what a format puts before all names of this part
    ('llm', 'head', 'projector' or 'vision'); `{}` is the layer's number, as our layers are stacked, [layers, ...].
    """

    ours: str
    part: str
    theirs: str
    transform: Transform

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs
