"""Config keys: what each means, which one somebody had in mind, and the ranges of numbers."""

from collections.abc import Callable, Iterable
import difflib
import functools
import inspect
import re

# What dimensions stay below: more would only overflow, or take minutes to be found too large for any machine.
_DIMENSIONS = {
    2**6: "num_qformer_layers projector_layers",
    2**12: "llama.num_hidden_layers vision.num_hidden_layers",
    2**14: "llama.num_attention_heads llama.num_key_value_heads llama.head_dim vision.num_attention_heads "
    "vision.image_size vision.patch_size",
    2**20: "num_voco_tokens num_compressed_tokens llama.hidden_size llama.intermediate_size vision.hidden_size "
    "vision.intermediate_size",
    2**24: "llama.vocab_size llama.vocab_multiple",
    2**31: "llama.max_position_embeddings",
}

# Smallest value of each number, and None or what it must stay below. A learning rate of 0 would train nothing.
RANGES = {
    **{f"model.{key}": (1, below) for below, keys in _DIMENSIONS.items() for key in keys.split()},
    "model.llama.rope_theta": (1, None),
    "model.lora.rank": (0, 2**20),
    "model.lora.alpha": (1e-12, None),
    **{f"model.{key}": (0, None) for key in ("llama.initializer_range", "vision.initializer_range")},
    **{f"model.{key}": (0, None) for key in ("llama.rms_norm_eps", "vision.layer_norm_eps")},
    **{f"mesh.{axis}": (-1, None) for axis in ("data", "fsdp", "frame", "tensor")},
    "tokenizer.vocab_size": (1, None),
    **{f"data.limits.{key}": (1, None) for key in ("picture_pixels", "picture_side", "row_bytes")},
    "data.batch_size": (1, None),
    **{f"data.{key}": (0, None) for key in ("images_per_pack", "rows_per_pack", "row_length")},
    **{f"data.{key}": (0, None) for key in ("conversations_per_record", "video.num_frames")},
    **{f"data.{key}": (0, None) for key in ("video.fps", "video.max_frames")},
    "data.random_crop": (1e-3, 1.0000001),
    "data.color_jitter": (0, 1),
    "data.max_skipped_fraction": (0, 1.0000001),
    "data.num_workers": (0, None),
    "data.num_threads": (0, None),
    "data.prefetch": (1, None),
    "optim.learning_rate": (1e-12, None),
    "optim.warmup_steps": (0, None),
    "optim.weight_decay": (0, None),
    "optim.b1": (0, 1),
    "optim.b2": (0, 1),
    "optim.clip_norm": (1e-12, None),
    "optim.decay_fraction": (0, 1.0000001),
    "optim.min_lr_ratio": (0, 1.0000001),
    "train.steps": (1, None),
    "train.accumulate": (1, None),
    "train.spike_factor": (0, None),
    "train.max_skipped": (0, None),
    "train.keep": (1, None),
    "train.keep_every": (0, None),
    "train.keep_best": (0, None),
    "train.log_every": (1, None),
    "train.checkpoint_every": (1, None),
    "train.profile_at": (0, None),
    "train.profile_steps": (1, None),
    "eval.batch_size": (1, None),
    "eval.max_new_tokens": (0, None),
    "eval.every": (0, None),
    "eval.num_batches": (0, None),
    "eval.num_answers": (0, None),
    "seed": (0, 2**31),
}


def meanings(source: Callable | type, name: str = "config", prefix: str = "") -> dict[str, str]:
    """Dotted key (behind `prefix`) → the comment beside its first assignment, or that in the lines above it.

    `source` is a function with lines `config.key = value  # meaning`, or a dataclass with lines
    `key: type = value  # meaning` (then `name` is empty).

    >>> def f():
    ...     config.seed = 0  # of all
    ...     # Beside pictures,
    ...     # too
    ...     config.optim.text = "a # b"
    >>> meanings(f)
    {'seed': 'of all', 'optim.text': 'Beside pictures, too'}
    """
    found: dict[str, str] = {}
    above: list[str] = []
    assigned = re.compile(rf"\s+{name}\.([\w.]+) = " if name else r"    (\w+): [^=]+ = ")
    for line in inspect.getsource(source).splitlines():
        code, comment = _split(line)
        if (match := assigned.match(code)) and prefix + match[1] not in found:
            found[prefix + match[1]] = comment or " ".join(above)
        above = [*above, comment] if not code.strip() and comment else []
    return found


def _split(line: str) -> tuple[str, str]:
    """Code and comment of a line; a # in a text is not a comment's."""
    match = re.match(r"""((?:[^#'"]|'[^']*'|"[^"]*")*)(?:#\s*(.*))?$""", line)
    return (match[1], (match[2] or "").strip()) if match else (line, "")


def unknown_key(key: str, known: Iterable[str], prefix: str = "config.") -> str:
    """What to say of a key (dotted) that is none: the nearest of those that there are, or that it is a group.

    >>> unknown_key("optim.lr", ["optim.learning_rate", "optim.name"])
    'no such key; did you mean config.optim.learning_rate?'
    """
    known = sorted(known)
    match = re.match(r"(data\.(train|test))\.[^.]+", key)
    if match and not any(other.startswith(f"{match[0]}.") for other in known):
        return f"no such source; a config file adds one: {prefix}{match[1]} = sources(NAME=source(KIND, …))"
    if any(other.startswith(f"{key}.") for other in known):
        return f"is a group of keys, for example {prefix}{next(k for k in known if k.startswith(f'{key}.'))}"
    groups = {other[: dot.start()] for other in known for dot in re.finditer(r"\.", other)}
    nearest = max([*known, *sorted(groups)], key=functools.partial(_nearness, key), default="")
    if _nearness(key, nearest) < 0.7:
        return "no such key; --help lists all"
    return f"no such key; did you mean {prefix}{nearest}?"


def _nearness(key: str, other: str) -> float:
    """Of two dotted keys: how alike their last parts are ('lr' stands for 'learning_rate'), and less their groups."""
    (*groups, last), (*other_groups, other_last) = key.lower().split("."), other.split(".")
    words = other_last.split("_")
    alike = difflib.SequenceMatcher(None, last, other_last).ratio()
    if len(words) > 1 and last in ("".join(word[0] for word in words), "".join(words)):
        alike = 0.9
    elif key.replace(".", "_") == other.replace(".", "_") or key.replace(".", "_") == other.replace(".", "_"):
        alike = 1.0
    elif last in words or other_last in last.split("_"):
        alike = max(alike, 0.75)
    return alike + 0.2 * difflib.SequenceMatcher(None, ".".join(groups), ".".join(other_groups)).ratio()
