"""A config that goes on with the parameters of another run, `init_from`."""

import shlex

from ml_collections import ConfigDict

from voco_jax.chat_templates import CUSTOM, TOKENIZER
from voco_jax.config import default_config, first_difference, load_config
from voco_jax.data.from_config import is_llava, make_model_config, template_of
from voco_jax.data.template_reader import marks_turns
from voco_jax.data.tokenizer import load_run_tokenizer
from voco_jax.errors import UserError
from voco_jax.io.paths import AnyPath, as_path, bucket_errors, exists
from voco_jax.models.compressors import COMPRESSORS

TILES = "tiles.json"  # of a run's directory: what was kept of a LLaVA-NeXT or LLaVA-OneVision (`convert/tiles.py`)
PIXELS = ("aspect_ratio", "transparency", "processor")  # of `config.data`


def begin_with_run(config: ConfigDict) -> ConfigDict:
    """A config with the dimensions and the tokenizer of the run that `init_from` names, or as it is without one. Plain
    LLaVA that goes on as such has its prompt too, where the config names no other, and so has a language model with a
    chat template of control tokens, or with its tokenizer's: its template, system text and place of images.

    UserError for a config that asks for other dimensions than the run has, where the run has LoRA for other LoRA, where
    its compressor has parameters for another compressor, and for texts beside the tokenizer's own chat template.
    """
    texts = first_difference(default_config().data.custom_template, config.data.custom_template)
    if config.data.template == TOKENIZER and texts:  # a run that goes on has them, as they were read when it began
        key, _, found = texts
        raise UserError(
            f"config.data.custom_template.{key}: expected none with config.data.template {TOKENIZER!r}, which reads "
            f"them from the tokenizer; found {found!r}, which {CUSTOM!r} takes"
        )
    if not config.init_from:
        return config
    directory = as_path(config.init_from)
    run = load_config(directory / "config.json")
    difference = first_difference(run.model.lora, config.model.lora) if run.model.lora.rank else None
    if difference:
        key, there, found = difference
        raise UserError(
            f"config.model.lora.{key}: {config.init_from} has LoRA with {there!r}, found {found!r}; "
            f"merge it first: voco convert merge {shlex.quote(str(config.init_from))} DST"
        )
    compressor = run.model.compressor
    if COMPRESSORS[compressor].has_weights and config.model.compressor != compressor:
        raise UserError(
            f"config.model.compressor: expected {compressor!r}, whose parameters {config.init_from} has; "
            f"found {config.model.compressor!r}"
        )
    # What its parameters have: a tokenizer trained with it has set its vocabulary, and its config does not say so
    tokenizer = load_run_tokenizer(directory)
    run.model.llama.vocab_size = make_model_config(run, tokenizer).llama.vocab_size
    config = inherit(config, run, config.init_from, tokenizer)
    config.tokenizer.source = str(directory / "tokenizer")
    return config


def inherit(config: ConfigDict, run: ConfigDict, name: str | AnyPath, tokenizer) -> ConfigDict:
    """A copy with what goes with a run's parameters: their dimensions, pixels that no config has by default or that go
    with what was kept about tiles, and the prompt of plain LLaVA, of control tokens, or of the run's tokenizer.
    `name`: the run's directory. UserError for a config that asks for others."""
    config, default = config.copy_and_resolve_references(), default_config()
    with bucket_errors(as_path(name)):
        keeps_tiles = exists(as_path(name) / TILES)
    with config.unlocked():
        of_model = "llama", "vision", "projector_layers", "projector_bias"
        _take_over(config.model, run.model, default.model, of_model, name)
        # Pixels that no config has by default, and those of the processor that goes back with tiles
        if first_difference(run.data.processor, default.data.processor) or keeps_tiles:
            _take_over(config.data, run.data, default.data, PIXELS, name, "config.data")
    data, theirs = config.data, run.data
    unnamed = data.template in (default.data.template, theirs.template)
    goes_on = is_llava(config) if is_llava(run) else theirs.template == TOKENIZER  # which someone asked for
    goes_on = goes_on or marks_turns(template_of(run), tokenizer)
    if goes_on and unnamed and data.custom_template == default.data.custom_template:
        data.template, data.custom_template = theirs.template, theirs.custom_template
        for key in ("system", "image_position"):
            data[key] = theirs[key] if data[key] == default.data[key] else data[key]
    return config


def inherited_prompt(asked: ConfigDict, config: ConfigDict) -> str:
    """A line about the prompt that the config `asked` for got from its base; '' where it got none."""
    keys = [key for key in ("template", "system", "image_position") if config.data[key] != asked.data[key]]
    if not keys:
        return ""
    said = "; ".join(f"config.data.{key}: {config.data[key]!r}" for key in keys)
    default = asked.data.template  # any other name in it would have been kept
    other = f"; for {default!r}, convert the base with to-jax --template {default}" if "template" in keys else ""
    return f"{said}, as in {config.init_from}{other}"


def other_pixels(init_from: str, data: ConfigDict) -> str:
    """A warning where `data` prepares images otherwise than the run `init_from` did; '' where it does not."""
    if not init_from:
        return ""
    there = load_config(as_path(init_from) / "config.json").data
    differing = [key for key in ("aspect_ratio", "transparency", "image_grid") if there[key] != data[key]]
    said = [f"config.data.{key}: {init_from} has {there[key]!r}, this config {data[key]!r}" for key in differing]
    return f"{'; '.join(said)}: the weights were trained on other pixels" if said else ""


def _take_over(config, run, default, keys, name, where: str = "config.model") -> None:
    """Keys, and groups of keys, as the run has them; UserError where the config asks for something else."""
    for key in keys:
        if isinstance(default[key], ConfigDict):
            _take_over(config[key], run[key], default[key], default[key].keys(), name, f"{where}.{key}")
            continue
        if config[key] not in (default[key], run[key]):
            raise UserError(
                f"{where}.{key}: {name} has {run[key]!r}, found {config[key]!r}; with init_from it need not be given"
            )
        config[key] = run[key]
