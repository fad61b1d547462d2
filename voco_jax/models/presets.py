"""Dimensions of the models people use, by name."""

from voco_jax.models.llama import LlamaConfig, RopeScaling
from voco_jax.models.vit import ViTConfig

LLAMA = {
    # Vicuna v1.5 is Llama 2, fine-tuned.
    "vicuna-7b": LlamaConfig(),
    "vicuna-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(),
    ),
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

VIT = {
    "clip-vit-l-14": ViTConfig(image_size=224),
    "clip-vit-l-14-336": ViTConfig(),
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
