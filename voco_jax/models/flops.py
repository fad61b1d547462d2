"""Floating-point operations of a training step by formula: what MFU is measured by.

A multiply and an add count as two. Matrix products with parameters cost 2 a parameter and token forward, as much again
for the gradient of their inputs, and again for the parameters' own where those train: 6·N a token in all. Causal
attention over T tokens costs 2·N·H·T a token and layer forward (half of the square), three times that in training.
Embedding, norms, rotary positions and the external compressors are left out; what remat computes again does not count.
LoRA's matrices are parameters like others; the kernels beside them are frozen, and have no gradients of their own.

The forward counts of each part are methods of its config (`LlamaConfig.layers_flops`, `ViTConfig.flops`, …).
"""

from collections.abc import Sequence
import dataclasses

from voco_jax.models.config import VoCoConfig


def training_flops(
    c: VoCoConfig, rows: int, length: int, images: int, freeze: Sequence[str] = (), compress_gradients: bool = True
) -> float:
    """A training step over read rows [rows, length] and images, `freeze` as in `train/trainable.py`.

    A frozen part has no gradient of its own parameters; one that nothing before it trains has no backward pass. The
    VoCo token's row always trains, where there is one. Without `compress_gradients` images go forward alone.
    """
    constant = 0.0
    if not compress_gradients:
        constant = c.vision.flops(images) + c.projector_flops(images) + c.compress_flops(images)
        images, freeze = 0, (*freeze, "vision_tower", "projector")

    def layers(c: VoCoConfig) -> float:
        read = c.llama.layers_flops(rows * length, length, c.lora)
        return read + (c.compress_flops(images) if c.has_compress_stream else 0)

    base = layers(dataclasses.replace(c, lora=None))
    head = "llama.embed_tokens" if c.llama.tie_word_embeddings else "llama.lm_head"
    parts = (
        ("vision_tower", c.vision.flops(images)),
        ("projector", c.projector_flops(images)),
        ("llama.embed_tokens", 0.0),
        ("llama.layers", base),
        (head, c.llama.head_flops(rows * length)),
    )
    freeze = (*freeze, "llama") if c.lora else freeze
    total = constant + 3 * (layers(c) - base)
    trains = False  # whether this part or one before it trains: it has a backward pass
    for part, forward in parts:
        frozen = any(f"{part}.".startswith(f"{path}.") for path in freeze)
        has_row = part == "llama.embed_tokens" and c.compressor_class.has_voco_tokens and compress_gradients
        trains = trains or not frozen or has_row
        total += forward * (1 + trains + (not frozen))
    return total
