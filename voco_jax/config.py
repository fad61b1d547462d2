"""Configurations: every key with its default and meaning (`--help` shows both), and their files in run directories."""

import ast
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
import re
import shlex

from ml_collections import ConfigDict

from voco_jax.config_keys import RANGES, unknown_key
from voco_jax.errors import UserError
from voco_jax.io.json_files import read_object
from voco_jax.io.paths import as_path, in_bucket
from voco_jax.models import presets
from voco_jax.models.build import llama_config, vision_config
from voco_jax.models.linear import LoRAConfig
from voco_jax.models.llama import RopeScaling


def default_config() -> ConfigDict:
    """All keys. A config file changes those that differ; the command line, any: `--config.optim.learning_rate=1e-3`.

    `--help` takes what a key means from here: each has a comment, beside it or in the lines above it.
    """
    config = ConfigDict()
    config.workdir = "runs/default"  # checkpoints, this config, the tokenizer and the metrics go here
    config.seed = 0  # random seed: first weights, order of the data, augmentation
    config.init_from = ""  # a run whose weights, dimensions and tokenizer this one begins with

    config.model = ConfigDict()  # what is trained; with init_from the dimensions are those of that run
    config.model.llama = llama_preset("demo")  # language model; presets: voco_jax/models/presets.py
    config.model.vision = vision_preset("demo")  # vision tower
    config.model.compressor = "voco"  # 'voco', 'none' (LLaVA: all patches are read), 'average_pool' or 'qformer'
    config.model.num_voco_tokens = 1  # VoCo tokens per image (K); with 'none' mere text, 0: plain LLaVA
    config.model.num_compressed_tokens = 1  # tokens per image with average_pool and qformer
    config.model.num_qformer_layers = 2  # layers of the Q-Former, with qformer
    config.model.projector_layers = 2  # linear layers with GELU between (LLaVA-1.5's mlp2x_gelu); 1: LLaVA's first
    config.model.param_dtype = "float32"  # dtype in which parameters are stored and updated; or 'bfloat16'
    config.model.dtype = "auto"  # dtype of the computation; 'auto': bfloat16 on accelerators, float32 on a CPU
    config.model.attention = "xla"  # attention kernel: 'xla' (any platform), 'splash' (TPU) or 'cudnn' (NVIDIA GPU)
    config.model.remat = "none"  # what the backward pass computes again: 'none' to 'full' (models/stack.py)
    config.model.unroll_layers = False  # no loop over layers: faster for few and small ones

    config.model.lora = ConfigDict()  # low-rank updates of the language model's kernels, which stay as they are
    config.model.lora.rank = 0  # rank of the updates; 0: no LoRA
    config.model.lora.alpha = 16.0  # updates are scaled by alpha / rank
    config.model.lora.targets = LoRAConfig.TARGETS  # kernels of a layer that have updates

    config.mesh = ConfigDict()  # devices along each axis (voco_jax/parallel/mesh.py); -1: as many as the others leave
    config.mesh.data = 1  # groups of devices with a copy of the weights each
    config.mesh.fsdp = -1  # devices over which the batch, the weights and the optimizer state are split
    config.mesh.frame = 1  # devices over which the images of a pack are split
    config.mesh.tensor = 1  # devices over which heads and MLP width are split

    config.tokenizer = ConfigDict()  # with init_from that of the run
    config.tokenizer.source = "train"  # a directory or a hub name; 'train' makes a small one from the data
    config.tokenizer.vocab_size = 512  # most tokens of the vocabulary, with source 'train'

    config.data = ConfigDict()  # docs/data.md
    config.data.train = sources(easyvqa=source("easyvqa"))  # by name; kinds and their keys: docs/data.md
    config.data.test = sources()  # by name; empty: none, or easy-VQA's own where it alone is trained on
    config.data.template = "voco_v1"  # text around questions and answers, by name (data/conversations.py), or 'custom'
    config.data.custom_template = ConfigDict()  # exact text, spaces too; '{eos}' is the end-of-sequence token
    config.data.custom_template.system = ""  # before the first turn
    config.data.custom_template.user = "USER: "  # before a question
    config.data.custom_template.assistant = " ASSISTANT:"  # after a question
    config.data.custom_template.answer = " "  # before an answer
    config.data.custom_template.end = "{eos}"  # after an answer
    config.data.custom_template.image = "<image>"  # an image before a question, and what follows each
    config.data.custom_template.after_images = "\n"  # after all images before a question
    config.data.aspect_ratio = "pad"  # to a square with the mean colour; or 'crop' its middle, or 'stretch' it
    config.data.transparency = "white"  # transparent parts become white; or 'drop': show their stored colours (LLaVA)
    config.data.processor = ConfigDict()  # the rest of what makes pixel values: voco_jax/data/images.py
    config.data.processor.resize_to = ()  # before the crop: (shorter side,) or (height, width); (): image_size
    config.data.processor.do_resize = True  # False: the middle is cut out of the picture at its own size
    config.data.processor.resample = "bicubic"  # Pillow's name of the filter
    config.data.processor.rescale_factor = 1 / 255  # grey levels 0 … 255 are multiplied with it
    config.data.processor.image_mean = (0.48145466, 0.4578275, 0.40821073)  # of rescaled red, green, blue; CLIP's
    config.data.processor.image_std = (0.26862954, 0.26130258, 0.27577711)  # standard deviations; CLIP's
    config.data.processor.pad_color = ()  # (red, green, blue), 0 … 255, around a padded picture; (): the mean colour

    config.data.limits = ConfigDict()  # what is larger is not read
    config.data.limits.picture_pixels = 89_478_485  # width × height of a picture: 2^30 bytes in all that is made of it
    config.data.limits.picture_side = 16_384  # longer side of a picture, in pixels
    config.data.limits.row_bytes = 2**20  # bytes of a row of JSON: some 250,000 tokens

    config.data.layout = "pack"  # conversations to packs by best fit, or 'group': one a pack, by modality and length
    config.data.batch_size = 16  # packs a step: a pack is some read rows and the images that their text speaks of
    config.data.images_per_pack = 1  # places for pictures, or frames of a clip; a record with more is left out
    config.data.rows_per_pack = 0  # read rows of a pack; 0: chosen from the data, for the fewest tokens an epoch
    config.data.row_length = 0  # tokens of a read row; 0: the length of the longest conversation
    config.data.conversations_per_record = 8  # conversations taken from a record, drawn anew each time; 0: all
    config.data.share_images = True  # records about one picture go into one pack, which compresses it once
    config.data.loss_weighting = "token"  # 'token': all labels count alike; 'conversation': all conversations do

    config.data.video = ConfigDict()  # which frames of a clip are looked at
    config.data.video.num_frames = 8  # frames taken from a clip, spread evenly; 0: by fps
    config.data.video.fps = 0.0  # frames a second of a clip, where num_frames is 0
    config.data.video.max_frames = 0  # most frames of a clip, by fps; 0: no limit
    config.data.video.random_offset = True  # in training, frames are drawn at random within the even spacing
    config.data.video.timestamps = False  # each frame's time in the text before it
    config.data.video.incomplete = False  # of a file that is cut off, take what is there; False: it cannot be used

    config.data.random_crop = 1.0  # augmentation: the least share of a picture's sides that is kept; 1: no cropping
    config.data.color_jitter = 0.0  # brightness, contrast and saturation change by at most this share

    config.data.max_skipped_fraction = 0.01  # largest share of records that cannot be used; with more the run stops
    config.data.cache_dir = "~/.cache/voco_jax"  # where indices of large sources are kept
    config.data.num_workers = 0  # processes that load batches, and that make the index
    config.data.num_threads = 0  # threads that load batches, in each of these processes; 0: from the machine's cores
    config.data.prefetch = 2  # batches made ahead, by each worker; at least one per thread

    config.optim = ConfigDict()  # docs/optimizer.md
    config.optim.name = "adamw"  # or 'muon' (matrices; AdamW for the rest), 'adafactor' (least memory)
    config.optim.rounding = "stochastic"  # of bfloat16 parameters and moments; 'nearest' loses small updates
    config.optim.learning_rate = 1e-3  # highest learning rate, reached after the warm-up
    config.optim.schedule = "cosine"  # 'cosine', 'linear', 'wsd' (constant, then down) or 'constant'
    config.optim.warmup_steps = 100  # steps in which the learning rate rises from 0
    config.optim.decay_fraction = 0.2  # share of the steps, at their end, in which 'wsd' goes down
    config.optim.min_lr_ratio = 0.0  # learning rate of the last step, as a share of learning_rate
    config.optim.lr_multiplier = ConfigDict()  # factors on the learning rate, by part of the model
    config.optim.lr_multiplier.vision_tower = 1.0  # of the vision tower
    config.optim.lr_multiplier.projector = 1.0  # of the projector
    config.optim.lr_multiplier.compressor = 1.0  # of a compressor with weights of its own (qformer)
    config.optim.lr_multiplier.llama = 1.0  # of the language model
    config.optim.weight_decay = 0.0  # decoupled weight decay, times the learning rate
    config.optim.decayed = ("kernel", "embedding")  # the parameters that decay, by the last part of their path
    config.optim.b1 = 0.9  # decay of Adam's first moment
    config.optim.b2 = 0.99  # decay of Adam's second moment
    config.optim.clip_norm = 1.0  # gradients with a larger norm are scaled down to it

    config.train = ConfigDict()  # docs/training.md
    config.train.freeze = ()  # parts that stay as they are, for example ("vision_tower",) or ("llama.layers",)
    # Whether gradients go through the compress stream. False: images' memories are constants, which the language model
    # learns to read; vision tower and projector, which act through them alone, are frozen as if `freeze` named them.
    config.train.compress_gradients = True
    config.train.loss = "cross_entropy"  # what is minimised, by name (train/losses.py): 'cross_entropy' of the answers
    config.train.steps = 1000  # updates, each of a batch
    config.train.accumulate = 1  # pieces that a batch is computed in, one after the other, before an update
    config.train.on_bad_step = "stop"  # where the loss is not finite, or a spike: 'stop', or 'skip' the update
    config.train.spike_factor = 0.0  # a loss this many times the running mean is a spike; 0: no check
    config.train.max_skipped = 10  # most steps in a row without an update; with more the run stops
    config.train.log_every = 20  # steps between lines of metrics.jsonl
    config.train.tensorboard = True  # write TensorBoard's files too
    config.train.wandb = ""  # project of Weights & Biases to which metrics are logged too; "": none
    config.train.profile_at = 0  # step at which a profiler trace begins; 0: only on SIGUSR1
    config.train.profile_steps = 5  # steps of a trace
    config.train.checkpoint_every = 500  # steps between checkpoints; the last step has one always
    config.train.keep = 2  # number of the newest checkpoints that are kept
    config.train.keep_every = 0  # keep the checkpoints of every so many steps too; 0: none
    config.train.keep_best = 0  # keep so many checkpoints of the lowest evaluation loss too

    config.eval = ConfigDict()  # docs/evaluation.md
    config.eval.batch_size = 64  # records, or questions, at once
    config.eval.max_new_tokens = 0  # longest answer, in tokens; 0: room for the test set's longest, from 8 to 256
    config.eval.every = 0  # steps between looks at the test set while training; 0: never
    config.eval.num_batches = 8  # batches of the test set for the loss while training
    config.eval.num_answers = 64  # questions of the test set that are answered while training

    return config.lock()


# The keys of each kind of source with their defaults. All have `weight`: how often an epoch takes each record.
SOURCE_KEYS = {
    "easyvqa": {"split": "train"},
    "llava": {"file": "", "images": "", "videos": ""},  # JSON or JSONL; the directories its paths start from
    "video_qa": {"file": "", "videos": ""},  # JSON or JSONL of video, question, answer
    "array_record": {"files": ""},  # a directory or a pattern; written by tools/build_records.py
    "tfds": {
        "name": "", "split": "train", "data_dir": "",
        "image": "image", "question": "question", "answer": "answer", "prompt": "",  # features; or one fixed question
    },
}  # fmt: skip


def source(kind: str, **keys) -> ConfigDict:
    """A source for `config.data.train` or `.test`: `source("llava", file="mix.json", images="pictures")`."""
    if kind not in SOURCE_KEYS:
        raise UserError(f"source: expected a kind of {', '.join(SOURCE_KEYS)}; found {kind!r}")
    known = {"weight": 1.0} | SOURCE_KEYS[kind]
    for key, value in keys.items():
        if key not in known:
            raise UserError(f"source {kind}: expected a key of {', '.join(known)}; found {key!r}")
        expected = float if key == "weight" else str
        if not isinstance(value, (int, float) if expected is float else str):
            raise UserError(f"source {kind}: {key}: expected {expected.__name__}, found {value!r}")
    return ConfigDict({"kind": kind} | known | keys)


def sources(**by_name: ConfigDict) -> ConfigDict:
    """Several sources, each under a name of your own; together they are a mixture."""
    return ConfigDict(by_name)


def sources_to_score(data: ConfigDict) -> ConfigDict:
    """The sources of `config.data.test`; easy-VQA's test split, where there are none and it alone is trained on."""
    kinds = {keys.kind for keys in data.train.values()}
    return data.test if data.test or kinds != {"easyvqa"} else sources(easyvqa=source("easyvqa", split="test"))


def llama_preset(name: str) -> ConfigDict:
    """Dimensions of a language model by name (`voco_jax/models/presets.py`), as a config of its own."""
    return ConfigDict(dataclasses.asdict(_preset(presets.LLAMA, "llama", name)), convert_dict=True)


def vision_preset(name: str) -> ConfigDict:
    """Dimensions of a vision tower by name."""
    return ConfigDict(dataclasses.asdict(_preset(presets.VIT, "vision", name)), convert_dict=True)


def _preset(table: dict, kind: str, name: str):
    if name not in table:
        raise UserError(f"{kind} preset: expected one of {', '.join(table)}; found {name!r}")
    return table[name]


def save_config(config: ConfigDict, path: str | os.PathLike) -> None:
    """The file is whole, or as it was: written apart and renamed, or in one piece to a bucket. UserError for one that
    `load_config` would not take."""
    path = as_path(path)
    try:
        text = _as_json(config.to_dict())
    except UserError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    if in_bucket(path):
        path.write_text(text)
        return
    temporary = Path(f"{path}.new")
    temporary.write_text(text)
    temporary.replace(path)


# Keys that runs made earlier do not have, with the value that means what those runs did.
ADDED_LATER = {
    "data.transparency": "drop",
    "data.video.incomplete": True,
    "model.projector_layers": 2,
    "optim.rounding": "nearest",
    "train.loss": "cross_entropy",
    "train.wandb": "",
    **{
        f"data.{group}.{key}": value
        for group in ("processor", "custom_template", "limits")
        for key, value in default_config().data[group].items()
    },
}
# Keys, and groups of keys, by the names that earlier runs have them under.
RENAMED = {
    "data.images_per_bin": "data.images_per_pack",
    "data.rows_per_bin": "data.rows_per_pack",
    "data.max_bad_share": "data.max_skipped_fraction",
    "optim.rate_scale": "optim.lr_multiplier",
    "optim.final_scale": "optim.min_lr_ratio",
    "optim.decay_share": "optim.decay_fraction",
}
_MOST = 2**20  # bytes of a config as JSON
_MOST_KEYS, _MOST_GROUPS = 20_000, 2048  # each source being a group of six keys; more would take seconds


def _as_json(config: dict) -> str:
    """UserError for one of more than there is room for."""
    text = json.dumps(config, indent=2) + "\n"
    found = {
        _MOST: ("bytes", len(text)),
        _MOST_KEYS: ("keys", text.count('": ')),
        _MOST_GROUPS: ("groups of keys", text.count("{")),
    }
    for most, (unit, count) in found.items():
        if count > most:
            raise UserError(f"expected {most} {unit} at most, found {count}")
    return text


def with_earlier_values(config: ConfigDict, stored: ConfigDict) -> ConfigDict:
    """A copy that goes on with what a stored config means by the keys in `ADDED_LATER`, where it does not ask for
    another value than the default."""
    asked, default, there = map(flatten, (config, default_config(), stored))
    kept = {key: old for key, old in ADDED_LATER.items() if there[key] == old != asked[key] == default[key]}
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(kept)
    return config


def load_config(path: str | os.PathLike) -> ConfigDict:
    """A config written by `save_config`; UserError names an unknown or missing key."""
    stored = read_object(path, "a run directory holds config.json, tokenizer/ and checkpoints/", _MOST)
    if "model_type" in stored:
        raise UserError(
            f"{path}: a checkpoint in Hugging Face's form, not a run; make one of it: "
            f"python tools/convert_weights.py to-jax {shlex.quote(str(as_path(path).parent))} RUN"
        )
    return parse_config(stored, path)


def parse_config(stored: dict, name: str | os.PathLike) -> ConfigDict:
    """A config of what `save_config` wrote as JSON; UserError, which begins with a name, says which key is wrong."""
    config = default_config()
    try:
        _as_json(stored)
        stored = ConfigDict(stored, convert_dict=True).to_dict()  # a copy; no key has a dot
        for old, new in RENAMED.items():
            group, _, key = old.rpartition(".")
            if key in stored.get(group, {}):
                stored[group][new.rpartition(".")[2]] = stored[group].pop(key)
        missing = flatten(config).keys() - flatten(ConfigDict(stored, convert_dict=True)).keys()
        missing -= {"model.llama.rope_scaling"}  # None, or keys of its own below this one
        missing = {key for key in missing if not key.startswith(("data.train.", "data.test."))}  # any sources
        config.update_from_flattened_dict({key: old for key, old in ADDED_LATER.items() if key in missing})
        if missing := missing - ADDED_LATER.keys():
            raise UserError(f"key {min(missing)!r} is missing")
        with config.unlocked():
            scaling = stored["model"]["llama"].pop("rope_scaling")  # the first had fewer keys
            scaling = None if scaling is None else dataclasses.asdict(RopeScaling(**scaling))
            config.model.llama.rope_scaling = scaling
            for key in ("train", "test"):
                by_name = stored["data"].pop(key)
                config.data[key] = sources(**{name: source(**keys) for name, keys in by_name.items()})
        config.update(stored)
        llama_config(config), vision_config(config)
        _check(config)
    except (KeyError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError, UserError) as error:
        raise UserError(f"{name}: {one_line(error):.500}") from None
    return config


# What stands in tuples, by an example.
_ELEMENTS = {
    **dict.fromkeys(("train.freeze", "optim.decayed", "model.lora.targets"), ""),
    **dict.fromkeys(("data.processor.resize_to", "data.processor.pad_color"), 0),
    **dict.fromkeys(("data.processor.image_mean", "data.processor.image_std"), 0.0),
}
_IN_WORDS = {str: "texts", int: "integers", float: "numbers"}


def find_problem(config: ConfigDict) -> tuple[str, str] | None:
    """(key, what is wrong with its value) of the first key that no run can have: unknown, of another type than its
    default, out of its range, or sources that are none."""
    flat, default = flatten(config), flatten(default_config())
    for part in ("data.train", "data.test"):
        by_name = config.data[part.removeprefix("data.")]
        if not isinstance(by_name, ConfigDict):
            return part, f"expected sources(NAME=source(…)), found {in_one_line(by_name)}"
        if isinstance(by_name.get("kind"), str):
            return part, f"expected sources(NAME=source({by_name.kind!r}, …)), found a source without a name"
        for name, keys in by_name.items():
            if not isinstance(keys, ConfigDict) or "kind" not in keys:
                found = f"the keys {', '.join(keys)}" if isinstance(keys, ConfigDict) else in_one_line(keys)
                return f"{part}.{name}", f"expected a source, as source() makes it; found {found}"
        flat = {key: value for key, value in flat.items() if not key.startswith(f"{part}.")}
        default = {key: value for key, value in default.items() if not key.startswith(f"{part}.")}
    for key, value in flat.items():
        if key.startswith("model.llama.rope_scaling"):
            continue
        if key not in default:
            return key, unknown_key(key, default)
        if not _is_like(value, default[key]):
            return key, f"expected {type_in_words(default[key])}, found {in_one_line(value)}"
        element = _ELEMENTS.get(key)
        if wrong := [x for x in value if not _is_like(x, element)] if element is not None else ():
            return key, f"expected a tuple of {_IN_WORDS[type(element)]}, found {in_one_line(wrong[0])} in it"
    if problem := _rope_problem(config.model.llama.rope_scaling):
        return "model.llama.rope_scaling", problem
    for key, (smallest, below) in RANGES.items():
        value = flat.get(key)
        if key == "model.num_voco_tokens" and flat["model.compressor"] == "none":
            smallest = 0  # plain LLaVA
        if not (isinstance(value, int | float) and smallest <= value < (math.inf if below is None else below)):
            beyond = f" and below {below}" if below is not None and (value >= smallest or key[:6] != "model.") else ""
            return key, f"expected at least {smallest:g}{beyond}, found {value!r}"
    return None


def _rope_problem(scaling) -> str:
    if scaling is None:
        return ""
    if not isinstance(scaling, ConfigDict):
        return f"expected None or a group of keys, found {in_one_line(scaling)}"
    known = dataclasses.asdict(RopeScaling())
    for key, value in scaling.items():
        if key not in known:
            return f"expected keys of {', '.join(known)}; found {key!r}"
        if not _is_like(value, known[key]) and (key, value) != ("attention_factor", None):
            return f"{key}: expected {type_in_words(known[key])}, found {in_one_line(value)}"
    try:
        RopeScaling(**scaling)
    except ValueError as error:
        return one_line(error)
    return ""


def in_one_line(value) -> str:
    """On one line, whatever it is."""
    return f"{' '.join(repr(value).split()):.80}"


def _check(config: ConfigDict) -> None:
    if problem := find_problem(config):
        raise UserError(f"config.{problem[0]}: {problem[1]}")


def _is_like(value, default) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def type_in_words(value) -> str:
    """What a key expects, by its default or another value of it."""
    if isinstance(value, ConfigDict):
        return "a group of keys"
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a tuple",
        tuple: "a tuple",
    }
    return words.get(type(value), f"a {type(value).__name__}")


def first_difference(a: ConfigDict, b: ConfigDict, ignore: Sequence[str] = ()) -> tuple[str, object, object] | None:
    """(key, value in a, value in b) of the first key that differs; some keys, or groups of keys, do not count."""
    flat_a, flat_b = flatten(a), flatten(b)
    for key in sorted(flat_a.keys() | flat_b.keys()):
        if any(key == free or key.startswith(f"{free}.") for free in ignore):
            continue
        if flat_a.get(key) != flat_b.get(key):
            return key, flat_a.get(key), flat_b.get(key)
    return None


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted key → value; tuples as lists, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def one_line(error: Exception) -> str:
    """What it says; a KeyError shows its argument as code, and ml_collections nests one in another."""
    while not isinstance(error, OSError) and error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error if isinstance(error, OSError | SyntaxError) or not error.args else error.args[0])
    if text[:1] in "'\"" and text[-1:] == text[:1]:
        with contextlib.suppress(ValueError, SyntaxError):
            text = str(ast.literal_eval(text))
    text = re.sub(r"Other fields present: .*?(?=Did you mean |$)", "", text, flags=re.DOTALL)  # a whole group's values
    return " ".join(text.split())
