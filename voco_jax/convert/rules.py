"""Which tensor of a PyTorch checkpoint is which parameter of ours: one table, read in both directions.

Names are given part by part (language model, head, projector, vision tower), as the formats differ only in what they
put before them (`formats.py`). `{}` is the layer's number; our layers are stacked, [layers, ...].
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
    """`ours` is a parameter's path; `part` and `theirs`, a tensor's name without the format's prefix."""

    ours: str
    part: str
    theirs: str
    transform: Transform

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs


def _rules() -> list[Rule]:
    rules = [
        Rule("llama.embed_tokens.embedding", "llm", "embed_tokens.weight", COPY),
        Rule("llama.norm.scale", "llm", "norm.weight", COPY),
        Rule("llama.lm_head.kernel", "head", "lm_head.weight", KERNEL),
        Rule("vision_tower.patch_embedding.kernel", "vision", "embeddings.patch_embedding.weight", PATCHES),
        Rule("vision_tower.class_embedding", "vision", "embeddings.class_embedding", COPY),
        Rule("vision_tower.position_embedding", "vision", "embeddings.position_embedding.weight", COPY),
    ]

    def add(ours: str, part: str, theirs: str, kernel: Transform, bias: Transform | None = None):
        rules.append(Rule(f"{ours}.kernel", part, f"{theirs}.weight", kernel))
        if bias is not None:
            rules.append(Rule(f"{ours}.bias", part, f"{theirs}.bias", bias))

    def add_norm(ours: str, theirs: str):
        rules.append(Rule(f"{ours}.scale", "vision", f"{theirs}.weight", COPY))
        rules.append(Rule(f"{ours}.bias", "vision", f"{theirs}.bias", COPY))

    for name in ("q_proj", "k_proj", "v_proj"):
        add(f"llama.layers.{name}", "llm", f"layers.{{}}.self_attn.{name}", KERNEL)
        add(f"vision_tower.layers.{name}", "vision", f"encoder.layers.{{}}.self_attn.{name}", KERNEL, HEAD_BIAS)
    add("llama.layers.o_proj", "llm", "layers.{}.self_attn.o_proj", FROM_HEADS)
    add("vision_tower.layers.out_proj", "vision", "encoder.layers.{}.self_attn.out_proj", FROM_HEADS, COPY)
    for name in ("gate_proj", "up_proj", "down_proj"):
        add(f"llama.layers.{name}", "llm", f"layers.{{}}.mlp.{name}", KERNEL)
    for name in ("fc1", "fc2"):
        add(f"vision_tower.layers.{name}", "vision", f"encoder.layers.{{}}.mlp.{name}", KERNEL, COPY)
    for name in ("input_layernorm", "post_attention_layernorm"):
        rules.append(Rule(f"llama.layers.{name}.scale", "llm", f"layers.{{}}.{name}.weight", COPY))
    for name in ("layer_norm1", "layer_norm2"):
        add_norm(f"vision_tower.layers.{name}", f"encoder.layers.{{}}.{name}")
    add_norm("vision_tower.pre_layernorm", "pre_layrnorm")  # CLIP's own spelling
    add_norm("vision_tower.post_layernorm", "post_layernorm")
    for i in (1, 2):
        add(f"projector.linear_{i}", "projector", f"linear_{i}", KERNEL, COPY)
    return rules


RULES = _rules()
BY_OURS = {rule.ours: rule for rule in RULES}
