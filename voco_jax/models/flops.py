"""Floating-point operations of the model by formula: what MFU is measured by.

A multiply and an add count as two. Matrix products with parameters cost 2 a parameter and token forward, as much again
for the gradient of their inputs, and again for the parameters' own where those train: 6·N a token in all. Causal
attention over T tokens costs 2·N·H·T a token and layer forward (half of the square), three times that in training.
Embedding, norms, rotary positions and the external compressors are left out; what remat computes again does not count.
LoRA's matrices are parameters like others; the kernels beside them are frozen, and have no gradients of their own.
"""

from collections.abc import Collection, Sequence
import dataclasses

from voco_jax.models.linear import LoRAConfig
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig


def projections(c: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix product of a decoder layer."""
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    width, mlp = c.hidden_size, c.intermediate_size
    return {
        "q_proj": (width, queries), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (queries, width),
        "gate_proj": (width, mlp), "up_proj": (width, mlp), "down_proj": (mlp, width),
    }  # fmt: skip


def layer_params(c: LlamaConfig, lora: LoRAConfig | None = None, names: Collection[str] | None = None) -> int:
    """Parameters of one decoder layer's matrix products, or of some by name, LoRA's among them."""
    chosen = {name: sizes for name, sizes in projections(c).items() if names is None or name in names}
    low_rank = sum(lora.rank * sum(sizes) for name, sizes in chosen.items() if name in lora.targets) if lora else 0
    return sum(inputs * outputs for inputs, outputs in chosen.values()) + low_rank


def layers_forward(c: LlamaConfig, tokens: int, context: int, lora: LoRAConfig | None = None) -> float:
    """Tokens through all layers, `context` tokens a causal row."""
    attention = 2 * c.num_attention_heads * c.head_dim * context
    return tokens * c.num_hidden_layers * (2 * layer_params(c, lora) + attention)


def head_forward(c: LlamaConfig, tokens: int) -> float:
    return tokens * 2 * c.hidden_size * c.vocab_size


def compress_forward(c: VoCoConfig, images: int) -> float:
    """Images through the compress stream; its last layer makes keys and values only."""
    tokens, llama = images * c.compress_length, c.llama
    last = 2 * layer_params(llama, c.lora, ("k_proj", "v_proj"))
    whole = layers_forward(llama, tokens, c.compress_length, c.lora) / llama.num_hidden_layers
    return whole * (llama.num_hidden_layers - 1) + tokens * last


def vision_forward(c: ViTConfig, images: int) -> float:
    """Images through the layers of the vision tower that are run; attention sees all patches."""
    tokens = c.num_patches + 1
    params = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
    patches = 2 * c.num_patches * 3 * c.patch_size**2 * c.hidden_size
    return images * (c.num_active_layers * tokens * (2 * params + 4 * c.hidden_size * tokens) + patches)


def projector_forward(c: VoCoConfig, images: int) -> float:
    width = c.llama.hidden_size
    return images * c.vision.num_features * 2 * (c.vision.hidden_size + (c.projector_layers - 1) * width) * width


def training_flops(
    c: VoCoConfig, rows: int, length: int, images: int, freeze: Sequence[str] = (), compress_gradients: bool = True
) -> float:
    """A training step over read rows [rows, length] and images, `freeze` as in `train/trainable.py`.

    A frozen part has no gradient of its own parameters; one that nothing before it trains has no backward pass. The
    VoCo token's row always trains, where there is one. Without `compress_gradients` images go forward alone.
    """
    constant = 0.0
    if not compress_gradients:
        constant = vision_forward(c.vision, images) + projector_forward(c, images) + compress_forward(c, images)
        images, freeze = 0, (*freeze, "vision_tower", "projector")

    def layers(c: VoCoConfig) -> float:
        read = layers_forward(c.llama, rows * length, length, c.lora)
        return read + (compress_forward(c, images) if c.compressor == "voco" else 0)

    base = layers(dataclasses.replace(c, lora=None))
    head = "llama.embed_tokens" if c.llama.tie_word_embeddings else "llama.lm_head"
    parts = (
        ("vision_tower", vision_forward(c.vision, images)),
        ("projector", projector_forward(c, images)),
        ("llama.embed_tokens", 0.0),
        ("llama.layers", base),
        (head, head_forward(c.llama, rows * length)),
    )
    freeze = (*freeze, "llama") if c.lora else freeze
    total = constant + 3 * (layers(c) - base)
    trains = False  # whether this part or one before it trains: it has a backward pass
    for part, forward in parts:
        frozen = any(f"{part}.".startswith(f"{path}.") for path in freeze)
        has_row = part == "llama.embed_tokens" and c.compressor in ("voco", "none") and compress_gradients
        trains = trains or not frozen or has_row
        total += forward * (1 + trains + (not frozen))
    return total
