"""GGUF files (llama.cpp's) of Llama-architecture models, through the `gguf` package; quantized tensors are expanded."""

from collections.abc import Collection
import dataclasses
import math
from pathlib import Path

import numpy as np

from voco_jax.convert.config_keys import GGUF
from voco_jax.convert.hf_configs import check_numbers
from voco_jax.convert.rope import rope_of_factors, rope_of_gguf
from voco_jax.convert.tensors import Tensor
from voco_jax.errors import UserError
from voco_jax.models.llama import LlamaConfig

_NAMES = {  # llama.cpp's to Hugging Face's
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


_PRE_TOKENIZERS = ("smollm",)  # how text is split before byte pairs are merged: digits one by one, then as GPT-2


def _reader(file: Path):
    try:
        import gguf
    except ImportError:
        raise UserError(f"{file}: reading GGUF needs the gguf package: pip install gguf") from None
    try:
        return gguf, gguf.GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{file}: not a readable GGUF file: {error}") from None


def read_gguf(file: Path, ignored: Collection[str] = ()) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """(dimensions, tensors in float32 under Hugging Face's names); `ignored`: unknown keys that are passed over."""
    gguf, reader = _reader(file)

    def field(key: str, default=None):
        found = reader.get_field(key)
        if found is None and default is None:
            raise UserError(f"{file}: key {key!r} is missing")
        return default if found is None else found.contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file}: general.architecture: expected 'llama', found {architecture!r}")
    # The values of the others, a tokenizer's, may be long
    names = [key for key in reader.fields if key in GGUF.expected or not GGUF.harmless.fullmatch(key)]
    GGUF.check({key: field(key) for key in names}, file, ignored=ignored)
    embedding = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise UserError(f"{file}: token_embd.weight is missing")
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    numbers = {
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": width,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv", heads),
        "head_dim": field("llama.attention.key_length", width // heads if isinstance(heads, int) and heads else width),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base", 10000.0),
    }
    check_numbers(file, numbers, "llama")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if field(key, numbers["head_dim"]) != numbers["head_dim"]:
            raise UserError(f"{file}: {key}: expected {numbers['head_dim']}, the size of a head; found {field(key)}")
    scale = numbers["head_dim"] ** -0.5
    found = field("llama.attention.scale", scale)
    if not isinstance(found, float) or not math.isclose(found, scale, rel_tol=1e-5):
        raise UserError(f"{file}: llama.attention.scale: expected {scale:.6g}, found {found!r}")
    try:
        config = LlamaConfig(
            **numbers,
            rope_scaling=rope_of_gguf(field, file),
            tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        )
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    kv_heads = config.num_key_value_heads
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        turned = {"attn_q": heads, "attn_k": kv_heads}.get(tensor.name.split(".")[-2])

        def read(tensor=tensor, shape=shape, turned=turned):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
            if turned:  # llama.cpp pairs neighbours for rotary positions, Hugging Face the two halves of a head
                values = values.reshape(turned, -1, 2, shape[-1]).swapaxes(1, 2).reshape(shape)
            return np.ascontiguousarray(values)

        if tensor.name == "rope_freqs.weight":
            scaling = rope_of_factors(read(), config, file)
            config = config if scaling is None else dataclasses.replace(config, rope_scaling=scaling)
            continue
        tensors[_hf_name(tensor.name)] = Tensor(shape, np.dtype(np.float32), file, read)
    return config, tensors


def _hf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("blk."):
        _, layer, kind, suffix = name.split(".")
        if kind in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"
    return name  # unknown, and reported as that


def gguf_tokenizer(file: Path):
    """The byte-pair tokenizer inside a GGUF file, as a Hugging Face tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    gguf, reader = _reader(file)
    content = {
        key: reader.get_field(f"tokenizer.ggml.{key}")
        for key in (
            "model",
            "pre",
            "tokens",
            "merges",
            "token_type",
            "bos_token_id",
            "eos_token_id",
            "padding_token_id",
        )
    }
    content = {key: None if field is None else field.contents() for key, field in content.items()}
    if content["model"] != "gpt2":
        raise UserError(
            f"{file}: tokenizer.ggml.model: expected 'gpt2', found {content['model']!r}; use --tokenizer DIR"
        )
    if content["pre"] not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise UserError(f"{file}: tokenizer.ggml.pre: expected {known}, found {content['pre']!r}; use --tokenizer DIR")
    missing = [key for key in ("tokens", "merges", "token_type") if content[key] is None]
    if missing:
        raise UserError(f"{file}: key 'tokenizer.ggml.{missing[0]}' is missing; use --tokenizer DIR")
    tokens = content["tokens"]
    merges = [tuple(merge.split(" ")) for merge in content["merges"]]
    bpe = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, content["token_type"], strict=True))
    control = [token for token, kind in kinds if kind == gguf.TokenType.CONTROL]
    bpe.add_special_tokens(control)
    bpe.add_tokens([token for token, kind in kinds if kind == gguf.TokenType.USER_DEFINED])

    def token(key):
        return None if content[key] is None else tokens[content[key]]

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=token("bos_token_id"),
        eos_token=token("eos_token_id"),
        pad_token=token("padding_token_id"),
        clean_up_tokenization_spaces=False,
    )
