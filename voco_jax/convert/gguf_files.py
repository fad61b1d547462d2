"""GGUF files (llama.cpp's format) of Llama and its relatives. Quantized tensors are expanded by the `gguf` package."""

from collections.abc import Collection, Mapping
import dataclasses
import math
import operator
from pathlib import Path
import re

import numpy as np

from voco_jax.convert.config_keys import check_numbers
from voco_jax.convert.families import LANGUAGE_MODELS
from voco_jax.convert.gguf_keys import ARCHITECTURES, keys_of, kinds_of
from voco_jax.convert.rope import rope_of_factors, rope_of_gguf
from voco_jax.data.tokenizer import set_stop_ids
from voco_jax.errors import UserError
from voco_jax.io.files import SourceFile
from voco_jax.io.tensors import Tensor, raw_tensor
from voco_jax.models.llama import LlamaConfig
from voco_jax.terminal import shortened

_NAMES = {  # llama.cpp's name → Hugging Face's
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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Known keys that differ from another known key by one character
_OTHERS = {"tokenizer.ggml.eom_token_id"}
# How text is split before byte pairs are merged. smollm: digits one by one, then as GPT-2; qwen2: llama.cpp's pattern
_PRE_TOKENIZERS = ("smollm", "qwen2")
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of a layer's tensors
_OF_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,8})\.(\w+)\.(weight|bias)")


def _read_header(file: Path):
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{file}: reading GGUF needs the gguf package: pip install gguf") from None
    from voco_jax.convert.gguf_header import read_header

    header = read_header(file)
    architecture = header.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        expected = " or ".join(map(repr, ARCHITECTURES))
        raise UserError(f"{file}: general.architecture: expected {expected}, found {shortened(architecture)}")
    for key, value in header.fields.items():
        _check_key(file, key, value, kinds_of(architecture))
    return header, architecture


def _check_key(file: Path, key: str, value: object, kinds: Mapping) -> None:
    """UserError for a value of the wrong type, and for a name that differs from a known key by one character: there
    are no such keys, so the file is damaged."""
    if key in kinds:
        expected, is_one = kinds[key]
        if not is_one(value):
            raise UserError(f"{file}: {key}: expected {expected}, found {shortened(value)}")
        return
    near = next((k for k in kinds if len(k) == len(key) and sum(map(operator.ne, k, key)) == 1), None)
    if near is not None and key not in _OTHERS:
        raise UserError(f"{file}: {key}: no such key; {near} damaged?")


def read_gguf(file: Path, ignored: Collection[str] = ()) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """(dimensions, tensors in float32 under Hugging Face's names). `ignored`: unknown keys to accept."""
    header, architecture = _read_header(file)

    def field(key: str, default=None):  # `.block_count` is the architecture's
        name = f"{architecture}{key}"
        found = header.fields.get(name, default)
        if found is None:
            raise UserError(f"{file}: key {name!r} is missing")
        return found

    keys = keys_of(architecture)
    # Without the tokenizer's keys, whose values may be long
    names = [key for key in header.fields if key in keys.expected or not keys.harmless.fullmatch(key)]
    keys.check({key: header.fields[key] for key in names}, file, ignored=ignored)
    embedding = next((entry for entry in header.tensors if entry.name == "token_embd.weight"), None)
    if embedding is None:
        raise UserError(f"{file}: token_embd.weight is missing")
    for key in ("tokens", "scores", "token_type"):
        found = len(header.fields.get(f"tokenizer.ggml.{key}", embedding.shape[0] * "x"))
        if found != embedding.shape[0]:
            expected = f"{embedding.shape[0]}, as token_embd.weight has rows"
            raise UserError(f"{file}: tokenizer.ggml.{key}: expected {expected}, found {found}")
    heads, width = field(".attention.head_count"), field(".embedding_length")
    numbers = {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": field(".feed_forward_length"),
        "num_hidden_layers": field(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(".attention.head_count_kv", heads),
        "head_dim": field(".attention.key_length", width // max(heads, 1)),
        "max_position_embeddings": field(".context_length"),
        "rms_norm_eps": field(".attention.layer_norm_rms_epsilon"),
        "rope_theta": field(".rope.freq_base", 10000.0),
    }
    check_numbers(file, numbers, "llama")
    prefix = f"{architecture}.rope.scaling.yarn_"
    rope = {key: value for key, value in header.fields.items() if key.startswith(f"{prefix}beta")}
    check_numbers(file, {key.removeprefix(prefix): value for key, value in rope.items()}, "yarn")
    if numbers["num_hidden_layers"] > len(header.tensors):
        raise UserError(
            f"{file}: {architecture}.block_count: expected the blocks of {len(header.tensors)} tensors, found "
            f"{numbers['num_hidden_layers']}"
        )
    for key in (".attention.value_length", ".rope.dimension_count"):
        if field(key, numbers["head_dim"]) != numbers["head_dim"]:
            raise UserError(
                f"{file}: {architecture}{key}: expected {numbers['head_dim']}, the size of a head; found {field(key)}"
            )
    scale = numbers["head_dim"] ** -0.5
    found = field(".attention.scale", scale)
    if not math.isclose(found, scale, rel_tol=1e-5):
        raise UserError(f"{file}: {architecture}.attention.scale: expected {scale:.6g}, found {shortened(found)}")
    try:
        config = LlamaConfig(
            **numbers,
            **LANGUAGE_MODELS[architecture].SWITCHES,
            rope_scaling=rope_of_gguf(field, architecture, file),
            tie_word_embeddings=all(entry.name != "output.weight" for entry in header.tensors),
        )
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    tensors = {}
    for entry in header.tensors:
        tensor = _tensor(header.file, entry, config, interleaved=architecture == "llama")
        if entry.name == "rope_freqs.weight":
            scaling = rope_of_factors(tensor.read(), config, file)
            config = config if scaling is None else dataclasses.replace(config, rope_scaling=scaling)
            continue
        tensors[_hf_name(entry.name)] = tensor
    return config, tensors


def _tensor(file: SourceFile, entry, config: LlamaConfig, *, interleaved: bool) -> Tensor:
    """A tensor as float32. UserError for a type that `gguf` cannot expand, and for another number of heads.

    `interleaved`: rotary positions pair neighbours, as llama.cpp has it for Llama alone.
    """
    from gguf import GGML_QUANT_SIZES, quants

    of_block, block_bytes = GGML_QUANT_SIZES[entry.type]
    try:
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), entry.type)
    except NotImplementedError:
        raise UserError(f"{file.path}: {entry.name}: type {entry.type.name} cannot be read") from None
    shape, found = entry.shape, _OF_BLOCK.fullmatch(entry.name)
    kind = found[2] if found and found[3] == "weight" else ""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
    if heads and (len(shape) != 2 or shape[0] != heads * config.head_dim):
        expected = f"{heads} heads of {config.head_dim} rows"
        raise UserError(f"{file.path}: {entry.name}: expected {expected}, found {list(shape)}")
    rows = math.prod(shape[:-1])
    raw = raw_tensor(file, entry.begin, (rows, entry.nbytes // rows), np.dtype(np.uint8))

    def read() -> np.ndarray:
        with np.errstate(all="ignore"):  # `Findings` reports values that are not finite
            values = quants.dequantize(raw.read(), entry.type).astype(np.float32, copy=False).reshape(shape)
        if heads and interleaved:  # in Hugging Face they pair the two halves of a head
            values = values.reshape(heads, -1, 2, shape[-1]).swapaxes(1, 2).reshape(shape)
        return np.ascontiguousarray(values)

    return Tensor(shape, np.dtype(np.float32), file.path, read)


def _hf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    found = _OF_BLOCK.fullmatch(name)
    if found and found[2] in _LAYER_NAMES:
        return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.{found[3]}"
    return f"gguf:{name}"  # unknown; the prefix keeps it from passing for one of Hugging Face's names


def gguf_tokenizer(file: Path):
    """The byte-pair tokenizer inside a GGUF file, as a Hugging Face tokenizer."""
    fields = _read_header(file)[0].fields
    content = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    from gguf import TokenType
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for key, known in (("model", ("gpt2",)), ("pre", _PRE_TOKENIZERS)):
        if content.get(key) not in known:
            expected = f"expected {' or '.join(map(repr, known))}, found {shortened(content.get(key))}"
            raise UserError(f"{file}: tokenizer.ggml.{key}: {expected}; use --tokenizer DIR")
    for key in ("tokens", "merges", "token_type", "eos_token_id"):
        if key not in content:
            raise UserError(f"{file}: key 'tokenizer.ggml.{key}' is missing; use --tokenizer DIR")
    tokens, types = content["tokens"], content["token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or "" in vocabulary:
        raise UserError(
            f"{file}: tokenizer.ggml.tokens: expected a different text for each token, found duplicates or ''"
        )
    if len(types) != len(tokens) or not set(types) <= {int(kind) for kind in TokenType}:
        raise UserError(f"{file}: tokenizer.ggml.token_type: expected one of {[*map(int, TokenType)]} for every token")
    merges = [tuple(merge.split(" ")) for merge in content["merges"]]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            expected = "expected two tokens that make a third"
            raise UserError(f"{file}: tokenizer.ggml.merges: {expected}, found {shortened(merge)}")
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if content["pre"] == "qwen2":
        bpe.normalizer = normalizers.NFC()
        splits = pre_tokenizers.Split(tokenizers.Regex(_QWEN2), behavior="isolated")
        parts = [splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = pre_tokenizers.Digits(individual_digits=True)
        parts = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts)
    bpe.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True))
    bpe.add_special_tokens([token for token, kind in kinds if kind == TokenType.CONTROL])
    bpe.add_tokens([token for token, kind in kinds if kind == TokenType.USER_DEFINED])

    def token(key):
        i = content.get(key)
        if i is not None and i >= len(tokens):
            raise UserError(f"{file}: tokenizer.ggml.{key}: expected a token's id below {len(tokens)}, found {i}")
        return None if i is None else tokens[i]

    # Qwen has none; what its files name is the default of its config.json
    has_bos = content["pre"] != "qwen2" or content.get("add_bos_token") is True
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=token("bos_token_id") if has_bos else None,
        eos_token=token("eos_token_id"),
        pad_token=token("padding_token_id"),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    if token("eot_token_id") is not None:  # ends an answer too
        set_stop_ids(tokenizer, (content["eot_token_id"],))
    return tokenizer
