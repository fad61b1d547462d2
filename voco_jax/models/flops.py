"""Floating-point operations of the model by formula: what MFU is measured by.

A multiply and an add count as two. Matrix products with parameters cost 2 a parameter and token forward, as much again
for the gradient of their inputs, and again for the parameters' own where those train: 6·N a token in all. Causal
attention over T tokens costs 2·N·H·T a token and layer forward (half of the square), three times that in training.
Embedding, norms, rotary positions and the external compressors are left out; what remat computes again does not count.
"""

from collections.abc import Sequence

from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig


def layer_params(c: LlamaConfig) -> int:
    """Parameters of one decoder layer's matrix products."""
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    return attention + 3 * c.hidden_size * c.intermediate_size


def layers_forward(c: LlamaConfig, tokens: int, context: int) -> float:
    """Tokens through all layers, `context` tokens a causal row."""
    attention = 2 * c.num_attention_heads * c.head_dim * context
    return tokens * c.num_hidden_layers * (2 * layer_params(c) + attention)


def head_forward(c: LlamaConfig, tokens: int) -> float:
    return tokens * 2 * c.hidden_size * c.vocab_size


def compress_forward(c: VoCoConfig, images: int) -> float:
    """Images through the compress stream; its last layer makes keys and values only."""
    tokens, llama = images * c.compress_length, c.llama
    last = 2 * llama.hidden_size * llama.head_dim * 2 * llama.num_key_value_heads
    whole = layers_forward(llama, tokens, c.compress_length) / llama.num_hidden_layers
    return whole * (llama.num_hidden_layers - 1) + tokens * last


def vision_forward(c: ViTConfig, images: int) -> float:
    """Images through the layers of the vision tower that are run; attention sees all patches."""
    tokens = c.num_patches + 1
    params = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
    patches = 2 * c.num_patches * 3 * c.patch_size**2 * c.hidden_size
    return images * (c.num_active_layers * tokens * (2 * params + 4 * c.hidden_size * tokens) + patches)


def projector_forward(c: VoCoConfig, images: int) -> float:
    width = c.llama.hidden_size
    return images * c.vision.num_features * 2 * (c.vision.hidden_size * width + width**2)


def training_flops(c: VoCoConfig, rows: int, length: int, images: int, freeze: Sequence[str] = ()) -> float:
    """A training step over read rows [rows, length] and images, `freeze` as in `train/freeze.py`.

    A frozen part has no gradient of its own parameters; one that nothing before it trains has no backward pass.
    """
    layers = layers_forward(c.llama, rows * length, length)
    layers += compress_forward(c, images) if c.compressor == "voco" else 0
    head = "llama.embed_tokens" if c.llama.tie_word_embeddings else "llama.lm_head"
    parts = (
        ("vision_tower", vision_forward(c.vision, images)),
        ("projector", projector_forward(c, images)),
        ("llama.embed_tokens", 0.0),
        ("llama.layers", layers),
        (head, head_forward(c.llama, rows * length)),
    )
    total, trains = 0.0, False  # whether this part or one before it trains, and so has a backward pass
    for part, forward in parts:
        frozen = any(f"{part}.".startswith(f"{path}.") for path in freeze)
        trains = trains or not frozen
        total += forward * (1 + trains + (not frozen))
    return total
