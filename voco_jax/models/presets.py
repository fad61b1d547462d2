"""Dimensions of the models people use, by name."""

import dataclasses

from voco_jax.models.llama import LlamaConfig, RopeScaling
from voco_jax.models.vit import ViTConfig

_LLAMA_3 = LlamaConfig(
    vocab_size=128256,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(),
)
_LLAMA_3_2 = dataclasses.replace(_LLAMA_3, rope_scaling=RopeScaling(factor=32.0), tie_word_embeddings=True)

LLAMA = {
    # Vicuna v1.5 is Llama 2, fine-tuned.
    "vicuna-7b": LlamaConfig(),
    "vicuna-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
    "llama-3.1-8b": _LLAMA_3,
    "llama-3.2-1b": dataclasses.replace(
        _LLAMA_3_2, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64
    ),
    "llama-3.2-3b": dataclasses.replace(
        _LLAMA_3_2, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24
    ),
    # v0.3; v0.1 has 32,000 tokens, rope_theta 10,000 and a sliding_window of 4,096
    "mistral-7b": LlamaConfig(
        vocab_size=32768,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rope_theta=1e6,
    ),
    **{
        f"qwen2.5-{name}": LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=name != "7b",
            qkv_bias=True,
        )
        for name, vocabulary, width, mlp, layers, heads, groups in (
            ("0.5b", 151936, 896, 4864, 24, 14, 2),
            ("1.5b", 151936, 1536, 8960, 28, 12, 2),
            ("3b", 151936, 2048, 11008, 36, 16, 2),
            ("7b", 152064, 3584, 18944, 28, 28, 4),
        )
    },
    **{
        f"qwen3-{name}": LlamaConfig(
            vocab_size=151936,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=name != "8b",
            qk_norm=True,
        )
        for name, width, mlp, layers, heads in (
            ("0.6b", 1024, 3072, 28, 16),
            ("1.7b", 2048, 6144, 28, 16),
            ("4b", 2560, 9728, 36, 32),
            ("8b", 4096, 12288, 36, 32),
        )
    },
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        initializer_range=0.041666666666666664,
    ),
    # Trained from scratch by the demo; the tokenizer trained with it sets the vocabulary.
    "demo": LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.08,  # 1/√width: at this size 0.02 takes hundreds of steps to leave the starting plateau
    ),
}
LLAMA["llama-2-7b"] = LLAMA["vicuna-7b"]
LLAMA["llama-2-13b"] = LLAMA["vicuna-13b"]

_CLIP_BASE = ViTConfig(
    image_size=224,
    patch_size=16,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
)
_SIGLIP_BASE = dataclasses.replace(
    _CLIP_BASE,
    class_token=False,
    patch_bias=True,
    pre_layernorm=False,
    hidden_act="gelu_tanh",
    layer_norm_eps=1e-6,
)
_SIGLIP_SO400M = dataclasses.replace(
    _SIGLIP_BASE,
    image_size=384,  # 27 × 27 patches of 14 pixels, and 6 pixels left over
    patch_size=14,
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
)

VIT = {
    "clip-vit-b-16": _CLIP_BASE,
    "clip-vit-l-14": ViTConfig(image_size=224),
    "clip-vit-l-14-336": ViTConfig(),
    "siglip-base-16-224": _SIGLIP_BASE,
    "siglip-so400m-14-384": _SIGLIP_SO400M,
    # SigLIP 2 of fixed resolution differs in its weights alone
    "siglip2-base-16-256": dataclasses.replace(_SIGLIP_BASE, image_size=256),
    "siglip2-so400m-14-384": _SIGLIP_SO400M,
    "demo": ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        select_layer=-1,
        initializer_range=0.08,
    ),
    # Trained from scratch too, beside a pretrained language model
    "small": ViTConfig(
        image_size=128,
        patch_size=16,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        select_layer=-1,
        initializer_range=0.05,
        position_init="sincos",
    ),
}
