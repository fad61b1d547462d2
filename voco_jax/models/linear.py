"""Flax's linear layers, with matrix products that are fast on CPUs too, and with LoRA where it is asked for."""

import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
from jax import lax

from voco_jax.keys import key


def dot_general(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, **kwargs: Any) -> jax.Array:
    """`lax.dot_general` of tokens [..., inputs] with a kernel [inputs, outputs]; either may be several axes.

    On CPU all tokens become one axis first. The result is the same; but the kernel's gradient is then a plain matrix
    product too, where XLA would contract over two axes at a third of the speed. Elsewhere tokens keep their axes,
    which may be sharded.
    """
    n = len(dimension_numbers[0][0])
    if dimension_numbers != ((tuple(range(lhs.ndim - n, lhs.ndim)), tuple(range(n))), ((), ())):
        raise ValueError(f"expected tokens [..., inputs] and a kernel [inputs, ...], found axes {dimension_numbers}")

    def flat(lhs, rhs):
        inputs = math.prod(rhs.shape[:n])
        product = lax.dot(lhs.reshape(-1, inputs), rhs.reshape(inputs, -1), **kwargs)
        return product.reshape(*lhs.shape[:-n], *rhs.shape[n:])

    def plain(lhs, rhs):
        return lax.dot_general(lhs, rhs, dimension_numbers, **kwargs)

    return lax.platform_dependent(lhs, rhs, cpu=flat, default=plain)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates of a decoder layer's kernels, W + alpha / rank · A B (Hu et al., arXiv:2106.09685)."""

    TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    rank: int = key(0, "rank of the updates; 0: no LoRA", low=0, below=2**20)
    alpha: float = key(16.0, "updates are scaled by alpha / rank", low=1e-12)
    targets: tuple[str, ...] = key(TARGETS, "kernels of a layer that have updates")

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        wrong = [repr(target) for target in self.targets if target not in self.TARGETS]
        if wrong or not self.targets:
            raise ValueError(f"targets: expected some of {', '.join(self.TARGETS)}; found {(wrong or ['none'])[0]}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoRALinear(nnx.LinearGeneral):
    """A linear layer; after `add_lora`, plus Flax's `nnx.LoRA` of the same input.

    A [inputs, rank] and B [rank, outputs] take heads and head size as one axis.
    """

    def __init__(self, in_features: int | tuple[int, int], out_features: int | tuple[int, int], **kwargs: Any):
        axis = (-2, -1) if isinstance(in_features, tuple) else -1
        super().__init__(in_features, out_features, axis=axis, dot_general=dot_general, **kwargs)
        self.lora: nnx.LoRA | None = nnx.data(None)

    def add_lora(self, config: LoRAConfig, rngs: nnx.Rngs) -> None:
        """A is drawn as in Hugging Face's PEFT, uniform within 1/√inputs; B is zeros: at first nothing changes."""
        self.lora_scale = config.scale
        self.lora = nnx.LoRA(
            math.prod(self.in_features), config.rank, math.prod(self.out_features), dtype=self.dtype,
            param_dtype=self.param_dtype, rngs=rngs,
            a_initializer=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        )  # fmt: skip

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        if self.lora is None:
            return y
        flat = inputs.reshape(*inputs.shape[: -len(self.in_features)], -1)
        return y + (self.lora(flat) * self.lora_scale).reshape(y.shape)


Linear = functools.partial(nnx.Linear, dot_general=dot_general)
LinearGeneral = functools.partial(nnx.LinearGeneral, dot_general=dot_general)
