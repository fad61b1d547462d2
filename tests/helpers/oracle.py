"""The oracle: one sequence, one dense mask, written from the formulas and sharing no code with the package.

A sequence has every token, images and all:

    … text  BOS V₁ … V_P ▁ \\n VoCo₁ … VoCo_K  text …
            └──────── an image segment ─────┘

    allowed(i, j), j ≤ i:   i in an image segment: j in the same segment
                            i text:                j text or VoCo

With memories of embeddings the sequence is read twice: the VoCo tokens' last hidden states, normed and projected, are
then ordinary tokens between the text, and no other token of an image segment is seen.

With one image at the front this is the released code's mask. Every token has a position for reading, and inside an
image segment one for compressing; keys are rotated by the one that the pair (i, j) calls for. In the released
numbering both are the place in the sequence, and the model is an ordinary one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sequence:
    """One conversation. `tokens` [n] has -1 at patches, whose features are `patch` [n] (image, patch) pairs."""

    tokens: np.ndarray
    patch: np.ndarray  # [n, 2]
    segment: np.ndarray  # [n], image segment or -1 for text
    is_voco: np.ndarray  # [n]
    compress_position: np.ndarray  # [n]
    read_position: np.ndarray  # [n]

    def padded(self, length: int) -> "Sequence":
        """With tokens at the end that nobody sees, in a segment of their own: equal lengths compile once."""
        room = length - len(self.tokens)
        padded = jax.tree.map(lambda x: np.pad(x, [(0, room)] + [(0, 0)] * (x.ndim - 1)), self)
        padded.segment[length - room :] = 99
        return padded

    def allowed(self) -> np.ndarray:
        i, j = np.indices((len(self.tokens),) * 2)
        same_segment = self.segment[i] == self.segment[j]
        text_may_see = (self.segment[j] < 0) | self.is_voco[j]
        return (j <= i) & jnp.where(self.segment[i] >= 0, same_segment, text_may_see)


def rms_norm(x, scale, eps=1e-5):
    return x * scale / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rotate(x, positions, theta):
    """[n, heads, H] as complex numbers x_i + i·x_{i+H/2}, turned by position · theta^(-2i/H)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    turned = z * jnp.exp(1j * positions[:, None] * theta ** (-jnp.arange(half) / half))[:, None]
    return jnp.concatenate([turned.real, turned.imag], -1)


def logits(params: dict, config, sequence: Sequence, features) -> jax.Array:
    """[n, V] of one sequence; `params` is the model's nested dict, `features` [images, P, D]."""
    llama, c = params["llama"], config.llama
    embedded = llama["embed_tokens"]["embedding"][jnp.maximum(sequence.tokens, 0)]
    patches = features[sequence.patch[:, 0], sequence.patch[:, 1]]
    x = jnp.where((sequence.tokens >= 0)[:, None], embedded, patches)
    if config.compressor == "voco_embedding":
        w, is_voco = params["compressor"], sequence.is_voco
        made = rms_norm(layers(llama, c, sequence, x), w["norm"]["scale"]) @ w["linear"]["kernel"] + w["linear"]["bias"]
        x = jnp.where(is_voco[:, None], made, x)
        segment = jnp.where(is_voco, -1, sequence.segment)
        sequence = dataclasses.replace(sequence, segment=segment, is_voco=jnp.zeros_like(is_voco))
    x = rms_norm(layers(llama, c, sequence, x), llama["norm"]["scale"])
    head = llama["embed_tokens"]["embedding"].T if c.tie_word_embeddings else llama["lm_head"]["kernel"]
    return x @ head


def layers(llama: dict, c, sequence: Sequence, x: jax.Array) -> jax.Array:
    """Hidden states [n, D] after all layers."""
    inside = (sequence.segment[:, None] == sequence.segment[None]) & (sequence.segment >= 0)[:, None]
    allowed = sequence.allowed()
    if c.sliding_window:
        place = jnp.where(inside, sequence.compress_position[:, None], sequence.read_position[:, None])
        seen = jnp.where(inside, sequence.compress_position[None], sequence.read_position[None])
        allowed = allowed & (place - seen < c.sliding_window)
    groups = c.num_attention_heads // c.num_key_value_heads

    def layer(x, w):
        y = rms_norm(x, w["input_layernorm"]["scale"])
        q, k, v = (jnp.einsum("nd,dhk->nhk", y, w[f"{name}_proj"]["kernel"]) for name in "qkv")
        if c.qkv_bias:
            q, k, v = (x + w[f"{name}_proj"]["bias"] for name, x in zip("qkv", (q, k, v), strict=True))
        if c.qk_norm:
            q, k = (rms_norm(x, w[f"{name}_norm"]["scale"]) for name, x in zip("qk", (q, k), strict=True))
        k, v = (jnp.repeat(m, groups, axis=1) for m in (k, v))

        def scores(positions):
            return jnp.einsum("ihk,jhk->hij", rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta))

        s = jnp.where(inside, scores(sequence.compress_position), scores(sequence.read_position))
        s = jnp.where(allowed, s / c.head_dim**0.5, -jnp.inf)
        x = x + jnp.einsum("hij,jhk,hkd->id", jax.nn.softmax(s, -1), v, w["o_proj"]["kernel"])
        y = rms_norm(x, w["post_attention_layernorm"]["scale"])
        gate = y @ w["gate_proj"]["kernel"]
        return x + (gate / (1 + jnp.exp(-gate)) * (y @ w["up_proj"]["kernel"])) @ w["down_proj"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, llama["layers"])
    return x
