"""Keys of other projects' configs: those that are computed, those that are harmless; all others are errors.

Each kind of file has one `Keys`. `computed` keys are read by the code that makes our config. `expected` keys may only
have the listed values, with which the model computes what ours does. `harmless` keys do not change what it computes.
Null means that a key is not set. The user can accept an unknown key with `--ignore-key`.
"""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import math
from pathlib import Path
import re

from voco_jax.convert.findings import listing
from voco_jax.errors import UserError
from voco_jax.keys import all_keys
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened


@dataclasses.dataclass(frozen=True)
class Keys:
    """The known keys of one kind of file. `harmless`: a pattern of whole names."""

    computed: frozenset[str]
    expected: Mapping[str, tuple]
    harmless: re.Pattern

    def __or__(self, other: "Keys") -> "Keys":
        """The keys of both; `other` decides where they differ."""
        harmless = re.compile(f"{self.harmless.pattern}|{other.harmless.pattern}")
        expected = {key: values for key, values in self.expected.items() if key not in other.computed}
        return Keys(self.computed | other.computed, {**expected, **other.expected}, harmless)

    def problems(self, fields: Mapping, prefix: str = "", ignored: Collection[str] = ()) -> list[str]:
        """A phrase for each key that is refused, with `prefix` before its name."""
        # Another model_type explains all other unknown keys
        if fields.get("model_type") and "model_type" in self.expected and len(fields) > 1:
            wrong = self.problems({"model_type": fields["model_type"]}, prefix)
            if wrong:
                return wrong
        found = []
        for key, value in fields.items():
            if value is None:
                continue
            if key in self.expected:
                if not any(value == allowed for allowed in self.expected[key]):
                    expected = " or ".join(map(repr, self.expected[key]))
                    found.append(f"{prefix}{key}: expected {expected}, found {shortened(value)}{_WHY.get(key, '')}")
            elif key not in self.computed and not self.harmless.fullmatch(key) and key not in ignored:
                unknown = "unknown, and may change what the model computes"
                found.append(f"{prefix}{key}: {unknown}; found {shortened(value)} (harmless? --ignore-key {key})")
        return found

    def check(self, fields: Mapping, file: Path, prefix: str = "", ignored: Collection[str] = ()) -> None:
        """UserError that names all keys that are refused."""
        problems = self.problems(fields, prefix, ignored)
        if problems:
            raise UserError(f"{file}: {listing(problems)}")


def section(fields: Mapping, key: str, file: Path) -> dict:
    """An object inside a config; {} where it is missing or null."""
    value = fields.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key}: expected an object, found {value!r}")
    return value


def given(fields: dict) -> dict:
    """The keys that are not null."""
    return {key: value for key, value in fields.items() if value is not None}


# The largest dimensions that a run's config takes
_MOST = {
    name: key.rules.below - 1
    for config in (LlamaConfig(), ViTConfig())
    for name, key in all_keys(config).items()
    if key.rules.below is not None
}
_LEAST = 1e-30  # smallest fraction: they become float32
_FRACTIONS = (
    "rms_norm_eps", "layer_norm_eps", "initializer_range", "rope_theta", "factor", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "r", "lora_alpha",
)  # fmt: skip


def check_numbers(file: Path, values: dict, what: str) -> None:
    """UserError unless dimensions are whole numbers and fractions numbers, above 0 and within the limits of a run's
    config (10⁹ layers would take for ever). `what` is written before the keys."""
    for key, value in values.items():
        if isinstance(value, bool) and key == "tie_word_embeddings":
            continue
        whole, most = key not in _FRACTIONS, _MOST.get(key, 2**31 - 1)
        kinds, expected = (int, "a whole number above 0") if whole else ((int, float), "a number above 0")
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise UserError(f"{file}: {what}.{key}: expected {expected}, found {shortened(value)}")
        if value > most if whole else not _LEAST <= value <= 1 / _LEAST:
            expected = f"at most {most}" if whole else f"a number of {_LEAST} to {1 / _LEAST}"
            raise UserError(f"{file}: {what}.{key}: expected {expected}, found {shortened(value)}")


def keys_of(computed: str, expected: Mapping[str, tuple], harmless: Iterable[str]) -> Keys:
    return Keys(frozenset(computed.split()), expected, re.compile("|".join(harmless)))


_WHY = {"quantization_config": " (quantized weights are not read; dequantize and save them first)"}
OFF = (False, None)
NONE = (None,)
ONE = (1, None)

# Keys that transformers' PretrainedConfig writes, or wrote, for any model: bookkeeping, outputs, sampling
ANY = keys_of(
    "model_type",
    {
        "quantization_config": NONE,
        "compression_config": NONE,
        "pruned_heads": ({}, None),
        "is_encoder_decoder": OFF,
        "add_cross_attention": OFF,
        "cross_attention_hidden_size": NONE,
        "tie_encoder_decoder": OFF,
    },
    (
        "_name_or_path|name_or_path|_commit_hash|architectures|auto_map|transformers_version|torch_dtype|dtype",
        r"_?attn_implementation\w*|_flash_attn\w*|_use_flash\w*|use_flash_attention(_2)?|use_flash_attn|flash_attention",
        r"use_cache|gradient_checkpointing|use_return_dict|return_dict\w*|torchscript|use_bfloat16|tf_legacy_loss",
        r"output_(attentions|hidden_states|scores|logits)|is_decoder|ignore_index|tokenizer_class|prefix|problem_type",
        r"finetuning_task|id2label|label2id|num_labels|task_specific_params|(bos|eos|pad|sep|decoder_start)_token_id",
        r"(bos|eos|pad|unk)_token|chunk_size_feed_forward|model_max_length|max_sequence_length|tokenizer_\w+",
        r"(max|min)(_new)?_(length|tokens)|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty",
        r"temperature|top_k|top_p|typical_p|min_p|repetition_penalty|length_penalty|penalty_alpha|num_return_sequences",
        r"(encoder_)?no_repeat_ngram_size|bad_words_ids|forced_(bos|eos)_token_id|remove_invalid_values",
        r"exponential_decay_length_penalty|(begin_)?suppress_tokens|renormalize_logits|guidance_scale|generation_config",
        r"force_words_ids|forced_decoder_ids|constraints|sequence_bias|epsilon_cutoff|eta_cutoff|low_memory|max_time",
        r"encoder_repetition_penalty|(cache|compile|watermarking)_config|cache_implementation|cache_dir|stop_strings",
        r"(attention|hidden|activation|resid|embd|classifier|feat_proj)?_?(dropout|pdrop)(_prob)?",
        r"attention_probs_dropout_prob|initializer_factor|unsloth\w*|transformers\.js_config",
    ),
)
