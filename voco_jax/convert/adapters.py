"""LoRA adapters of PEFT and of LLaVA's training: they are added to their base's weights when these are read.

`adapter_config.json` says how, and `adapter_model.safetensors` (or `.bin`) holds the matrices. Parameters that LLaVA
trained without LoRA are in `non_lora_trainables.bin`, or `mm_projector.bin` if it trained the projector alone.
W + scale · B A is computed in float32 and rounded once to W's dtype, one tensor at a time.
"""

from collections.abc import Collection, Mapping
import dataclasses
import math
from pathlib import Path
import re

import numpy as np

from voco_jax.convert.config_keys import NONE, OFF, check_numbers, keys_of, section
from voco_jax.convert.families import language_family, llava
from voco_jax.convert.findings import listing
from voco_jax.convert.formats import key_of_name
from voco_jax.convert.torch_files import read_torch
from voco_jax.errors import UserError
from voco_jax.io.json_files import read_object
from voco_jax.io.safetensors import read_safetensors
from voco_jax.io.tensors import Tensor
from voco_jax.models.llama import LlamaConfig
from voco_jax.terminal import shortened

ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<kind>(embedding_)?[AB]|magnitude_vector)(\.default)?(\.weight)?")
_WRAPPED = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")  # parts that PEFT adds to names
# Fields that do not change what a model computes (the size of the vocabulary shows in the tensors)
FREE = ("vocab_size", "vocab_multiple", "initializer_range", "max_position_embeddings")
# PEFT's adapter_config.json.
_KEYS = keys_of(
    "r lora_alpha alpha_pattern rank_pattern use_rslora use_dora base_model_name_or_path",
    {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "fan_in_fan_out": OFF,
        "lora_bias": OFF,
        # Other values change the base's weights at the beginning of training
        "init_lora_weights": (True, False, "gaussian", "orthogonal", None),
        "layer_replication": (None, []),
        "trainable_token_indices": NONE,
        "target_parameters": (None, []),
        "enable_lora": NONE,
        "alora_invocation_tokens": NONE,
        "use_qalora": OFF,
        "use_bdlora": OFF,
        "loftq_config": ({}, None),
        "eva_config": NONE,
        "corda_config": NONE,
        "arrow_config": NONE,
        "lora_ga_config": NONE,
        "megatron_config": NONE,
        "monteclora_config": NONE,
    },
    (
        "auto_mapping|inference_mode|revision|task_type|target_modules|exclude_modules|layers_to_transform",
        "layers_pattern|lora_dropout|modules_to_save|megatron_core|qalora_group_size|peft_version|runtime_config",
        "ensure_weight_tying|ephemeral_gpu_offload|merge_weights",
    ),
)

Key = tuple[str, int | None]  # (our parameter's path, layer)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter: config and weights."""
    names = ("adapter_model.safetensors", "adapter_model.bin")
    return (path / ADAPTER_CONFIG).exists() and any((path / name).exists() for name in names)


def base_of(path: Path) -> str | None:
    """The name of an adapter's base: on the hub, or a path on the machine that trained it."""
    return read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")


def trained_beside(path: Path) -> dict[str, Tensor]:
    """Tensors that were trained without LoRA, under their names without PEFT."""
    tensors: dict[str, Tensor] = {}
    for name in ("mm_projector.bin", "non_lora_trainables.bin"):
        found = read_torch(path / name) if (path / name).exists() else {}
        found = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}
        tensors |= {f"model.{name}" if name.startswith("mm_projector.") else name: t for name, t in found.items()}
    if not tensors and not is_adapter(path):
        raise UserError(f"{path}: --base: expected a LoRA adapter or mm_projector.bin in it, found neither")
    return tensors


def check_same_model(model: LlamaConfig, file: Path, base: Path) -> None:
    """UserError where an adapter's config and its base's describe different language models."""
    fields = read_object(base)
    text = section(fields, "text_config", base) or fields
    family = language_family(text, base)
    other = family.from_hf(text, base, family.KEYS | llava.OWN_KEYS)
    for field in dataclasses.fields(LlamaConfig):
        ours, theirs = getattr(model, field.name), getattr(other, field.name)
        if field.name not in FREE and ours != theirs:
            raise UserError(
                f"{base}: {field.name}: expected {ours!r}, as {file} has it, found {theirs!r}: another base?"
            )


def replace(tensors: dict[Key, Tensor], names: dict[Key, str], trained: Mapping[str, Tensor], path: Path) -> None:
    """Replace tensors of the base by those trained without LoRA. UserError for a name that the base does not have."""
    unknown = []
    for name, tensor in trained.items():
        key = key_of_name(name)
        if key not in tensors:
            unknown.append(f"{name} unknown ({tensor.file.name})")
        else:
            tensors[key], names[key] = tensor, name
    if unknown:
        raise UserError(f"{path}: {len(unknown)} tensors do not fit the base: {listing(unknown)}")


def apply_adapter(
    tensors: dict[Key, Tensor], names: dict[Key, str], path: Path, ignored: Collection[str] = (), *, tied: bool = False
) -> None:  # fmt: skip
    """Replace tensors of the base by merged ones. UserError for an unknown kind of adapter, and for another base.

    `tied`: the base's head is its embedding. PEFT adapts one of the two and leaves the other as it was; a merged tensor
    would stand for both.
    """
    file = path / ADAPTER_CONFIG
    config = read_object(file)
    _KEYS.check(config, file, ignored=ignored)
    weights = path / "adapter_model.safetensors"
    stored = read_safetensors(weights) if weights.exists() else read_torch(path / "adapter_model.bin")
    modules: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        plain = name.removeprefix(_PREFIX)
        found = _MATRIX.fullmatch(plain)
        place, kind = (whole, _WRAPPED.sub("", plain))
        if found is not None:
            place, kind = modules.setdefault(found["module"], {}), found["kind"]
            if kind.startswith("embedding_"):  # an embedding is the transpose of a linear layer's weight
                kind, tensor = {"embedding_A": "B", "embedding_B": "A"}[kind], _transposed(tensor)
        if kind in place:
            raise UserError(
                f"{tensor.file}: {name}: expected one such tensor, found two, apart from what PEFT adds to names"
            )
        place[kind] = tensor
    adapted = [*modules, *(config.get("modules_to_save") or ())]
    of_vocabulary = [name for name in adapted if str(name).endswith(("embed_tokens", "lm_head"))]
    if tied and of_vocabulary:
        raise UserError(f"{path}: {of_vocabulary[0]}: adapters of tied embeddings are not read (tie_word_embeddings)")
    replace(tensors, names, whole, path)
    problems = []
    for module, matrices in modules.items():
        key = key_of_name(f"{module}.weight")
        if key not in tensors:
            problems.append(f"{module}: the base has no such layer")
            continue
        try:
            tensors[key] = _merged(tensors[key], matrices, config, module, file)
        except ValueError as error:
            problems.append(f"{module}: {error}")
    if problems:
        raise UserError(f"{path}: {len(problems)} layers of the adapter do not fit the base: {listing(problems)}")


def _merged(base: Tensor, matrices: dict[str, Tensor], config: dict, module: str, file: Path) -> Tensor:
    """W + scale · B A; with DoRA, its rows are scaled to the learnt lengths. ValueError for shapes that do not fit."""
    kinds = ["A", "B", "magnitude_vector"] if config.get("use_dora") else ["A", "B"]
    if sorted(matrices) != kinds:
        raise ValueError(f"expected lora_{', lora_'.join(kinds)}; found {', '.join(sorted(matrices))}")
    a, b, lengths = matrices["A"], matrices["B"], matrices.get("magnitude_vector")
    numbers = {"r": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        numbers[key] = _by_pattern(section(config, patterns, file), module, numbers[key])
    check_numbers(file, numbers, module)
    rank, (outputs, inputs) = numbers["r"], base.shape
    if (a.shape, b.shape) != ((rank, inputs), (outputs, rank)):
        expected = f"A [{rank}, {inputs}] and B [{outputs}, {rank}]"
        raise ValueError(f"expected {expected}, found {list(a.shape)} and {list(b.shape)}")
    if lengths is not None and math.prod(lengths.shape) != outputs:
        raise ValueError(f"expected a magnitude vector of {outputs} numbers, found {list(lengths.shape)}")
    scale = numbers["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def read() -> np.ndarray:
        weight = base.read()
        low = [matrix.read().astype(np.float32) for matrix in (b, a)]
        merged = np.float32(scale) * (low[0] @ low[1])
        merged += weight
        if lengths is not None:
            wanted = lengths.read().astype(np.float32).reshape(-1, 1)
            merged *= wanted / np.linalg.norm(merged, axis=1, keepdims=True)
        return merged.astype(weight.dtype)

    return dataclasses.replace(base, read=read)


def _transposed(tensor: Tensor) -> Tensor:
    return dataclasses.replace(tensor, shape=tensor.shape[::-1], read=lambda: tensor.read().T)


def _by_pattern(patterns: Mapping, module: str, default):
    """The number of the first pattern (regular expression) that matches the end of a module's name, or the default.

    ValueError for a pattern that could take ages: with a repeated group, or many repetitions.
    """
    for pattern, number in patterns.items():
        if len(pattern) > 1000 or len(re.findall(r"[*+?{]", pattern)) > 3 or re.search(r"\)[*+?{]", pattern):
            raise ValueError(f"expected a simpler pattern, found {shortened(pattern)}")
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return number
        except re.error as error:
            raise ValueError(f"pattern {shortened(pattern)}: {error}") from None
    return default
