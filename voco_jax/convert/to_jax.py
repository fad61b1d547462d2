"""PyTorch and Hugging Face checkpoints to a run of ours, tensor by tensor."""

from collections.abc import Callable, Collection
import dataclasses
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
import numpy as np
from tqdm import tqdm

from voco_jax.chat_templates import TOKENIZER
from voco_jax.config import default_config, load_config, save_config, vision_preset
from voco_jax.convert.chat_templates import chat_template_of, image_token_of
from voco_jax.convert.families import BY_OURS
from voco_jax.convert.findings import Findings, listing
from voco_jax.convert.gguf_files import gguf_tokenizer
from voco_jax.convert.jax_checkpoint import Parameter, write_checkpoint
from voco_jax.convert.sources import Source
from voco_jax.convert.tiles import pixels_of, write_tiles
from voco_jax.convert.vocabulary import EMBEDDING, VOCABULARY, with_fresh_rows
from voco_jax.data.from_config import TODAY, make_encoder, make_model_config, set_processor, set_template
from voco_jax.data.template_reader import fitting_templates, marks_turns, named_alike, read_chat_template
from voco_jax.data.tokenizer import add_voco_token, load_tokenizer, save_tokenizer, set_stop_ids
from voco_jax.data.tokenizer_files import stop_ids_of
from voco_jax.errors import UserError
from voco_jax.io.atomic import check_is_new, check_space, new_directory
from voco_jax.io.tensors import DTYPES
from voco_jax.models.build import abstract_model, init_params
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.models.voco import VoCoConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """`dtype` None: as stored. `voco_init`: rows of added tokens are random ('normal') or the mean of all ('mean').

    `num_voco_tokens` None: 1, or 0 with compressor 'none', which makes plain LLaVA. `vocab_multiple`: zeros pad the
    vocabulary to a multiple of it, so that it can be sharded. `template`: `choose_template`.
    `vision`: the preset whose dimensions a vision tower has that is drawn; None: CLIP ViT-L/14's at 336 pixels.
    """

    dtype: str | None = None
    voco_init: str = "mean"
    num_voco_tokens: int | None = None
    compressor: str = "voco"
    init_missing: bool = False
    seed: int = 0
    vocab_multiple: int = 128
    template: str | None = None
    vision: str | None = None

    @property
    def is_llava(self) -> bool:
        return COMPRESSORS[self.compressor].keeps_text(self.num_voco_tokens or 0)


def check_source(source: Source, config: VoCoConfig, *, same_dtypes: bool = True) -> list[str]:
    """All tensors that do not fit the model before tokens are added; a part that is missing as a whole is no problem.

    `same_dtypes`: the layers of a stack must have one dtype.
    """
    as_stored = dataclasses.replace(config.llama, vocab_size=source.llama.vocab_size, vocab_multiple=1)
    _, params = abstract_model(dataclasses.replace(config, llama=as_stored, voco_token_id=0))
    problems = list(source.problems)
    parts, left = source.parts(), dict(source.tensors)
    for path, rule, layer, shape in layers_of({part: params[part] for part in params if part in parts}):
        tensor = left.pop((path, layer), None)
        where = path if layer is None else f"{path} (layer {layer})"
        if tensor is None:
            problems.append(f"{where} missing (expected {list(rule.transform.their_shape(shape))})")
        elif tensor.shape != rule.transform.their_shape(shape):
            expected = list(rule.transform.their_shape(shape))
            empty = "" if tensor.size else " (DeepSpeed's ZeRO-3 left it empty: save it with zero_to_fp32.py)"
            found = f"{list(tensor.shape)}{empty}"
            problems.append(f"{source.names[path, layer]}: expected shape {expected}, found {found}")
        elif tensor.dtype not in DTYPES.values():
            problems.append(f"{source.names[path, layer]}: expected {', '.join(DTYPES)}; found {tensor.dtype}")
        elif same_dtypes and layer and tensor.dtype != source.tensors.get((path, 0), tensor).dtype:
            of_first = source.tensors[path, 0].dtype
            problems.append(f"{source.names[path, layer]}: expected {of_first} as layer 0, found {tensor.dtype}")
    return problems + [f"{source.names[key]} unknown ({left[key].file.name})" for key in left]


def layers_of(model_params: dict):
    """(path, rule, layer or None, shape of one layer) of every parameter that has a rule, layer by layer."""
    for path, leaf in flatten_dict(model_params, sep=".").items():
        rule = BY_OURS.get(path)
        if rule is None:
            continue
        if rule.stacked:
            yield from ((path, rule, layer, leaf.shape[1:]) for layer in range(leaf.shape[0]))
        else:
            yield path, rule, None, leaf.shape


def load_source_tokenizer(source: Source, given: Path | None):
    """(the given tokenizer or the source's, with `<voco>` added; the ids that it had before)."""
    place = given or source.tokenizer
    if place is None:
        raise UserError(f"{source.path}: no tokenizer inside; give one with --tokenizer DIR")
    tokenizer = gguf_tokenizer(place) if place.suffix == ".gguf" else load_tokenizer(place, add_voco=False)
    if given is not None and (stop_ids := stop_ids_of(source.path, tokenizer.backend_tokenizer)):
        set_stop_ids(tokenizer, stop_ids)  # the model's
    tokens = set(tokenizer.get_vocab().values())
    add_voco_token(tokenizer)
    return tokenizer, tokens


def to_jax(
    source: Source, destination: Path, tokenizer_dir: Path | None, options: Options, log: Callable[[str], Any] = print
) -> list[str]:  # fmt: skip
    """Write a run directory with checkpoint 0; returns warnings. One UserError names everything that does not fit.

    `log` gets a line about the prompt that was chosen.
    """
    check_is_new(destination)
    if options.vision is not None and (source.vision is not None or not options.init_missing):
        found = f"{source.path} with its own" if source.vision is not None else "no --init-missing"
        raise UserError(f"--vision {options.vision}: expected a vision tower to draw, found {found}")
    tokenizer, tokens = load_source_tokenizer(source, tokenizer_dir)
    config = run_config(source, len(tokenizer), options, destination)
    warnings = choose_template(config.data, source, tokenizer, options, log)
    model_config = make_model_config(config, tokenizer)
    make_encoder(config, tokenizer, model_config)  # raises for a template of other control tokens
    _, ours = abstract_model(model_config)
    missing = [part for part in ours if part not in source.parts()]
    if missing and ("llama" in missing or not options.init_missing):
        drawn = "them" if len(missing) > 1 else "it"
        hint = "" if "llama" in missing else f"; --init-missing draws {drawn} at random"
        raise UserError(f"{source.path}: no {' and no '.join(missing)}{hint}")
    problems = check_source(source, model_config, same_dtypes=options.dtype is None)
    if problems:
        raise UserError(f"{source.path}: {len(problems)} tensors do not fit: {listing(problems)}")

    voco, fresh = model_config.voco_token_id, set()
    if voco not in tokens and not has_voco_row(source, voco):
        fresh = {voco}
    findings = Findings()
    drawn = flatten_dict(init_params(model_config, options.seed, missing), sep=".")
    make = parameter_maker(source, options, findings, drawn, fresh, tokens, model_config.llama.vocab_size)
    parameters = {path: make(path, leaf.shape) for path, leaf in flatten_dict(ours, sep=".").items()}
    total = sum(parameter.nbytes for parameter in parameters.values())
    check_space(destination, total)
    with new_directory(destination) as run:
        save_config(config, run / "config.json")
        load_config(run / "config.json")  # raises for a config that could not be loaded later
        save_tokenizer(tokenizer, run / "tokenizer")
        if source.tiles is not None:
            pixels = pixels_of(config) if source.tiles.files else {}
            write_tiles(run, dataclasses.replace(source.tiles.cast(options.dtype, findings), pixels=pixels))
        with tqdm(total=total, unit="B", unit_scale=True, desc="to-jax") as bar:
            write_checkpoint(run, unflatten_dict(parameters, sep="."), config, bar.update)
        return source.notes + warnings + findings.finish(source.path)


def choose_template(
    data: ConfigDict, source: Source, tokenizer, options: Options, log: Callable[[str], Any] = print
) -> list[str]:  # fmt: skip
    """Set the run's prompt: the one asked for; else the source's chat template, of plain LLaVA, and of a language model
    whose turns begin with control tokens; else that of VoCo training. Returns warnings.

    UserError where the chat template is asked for, and cannot be followed.
    """
    found, asked = chat_template_of(source.path, tokenizer), options.template
    if found is not None:
        tokenizer.chat_template = found[0]  # stored with the tokenizer, for `to-hf`
    if asked not in (None, TOKENIZER):
        data.template = asked
        return []
    if options.is_llava:
        data.template = "llava_v1"
    if found is None:
        if asked == TOKENIZER:
            raise UserError(f"--template {TOKENIZER}: {source.path}: no chat template")
        return []
    (text, file), image_token = found, image_token_of(source.path)
    try:
        template = read_chat_template(text, tokenizer, image_token)
    except UserError as error:
        alike = named_alike(text, tokenizer, image_token, about_images=options.is_llava)
        reason = f"a chat template that cannot be followed ({error})"
        if asked == TOKENIZER:
            names = alike or ", ".join(fitting_templates(tokenizer))
            raise UserError(
                f"--template {TOKENIZER}: {file}: {reason}; choose another with --template: {names}"
            ) from None
        data.template = alike or data.template
        how = ", which asks a first question alike" if alike else ""
        return [f"{file}: {reason}: the prompt is {data.template}'s{how}; --template chooses another"]
    if asked is None and not (options.is_llava or marks_turns(template, tokenizer)):
        return []
    set_template(data, template)
    if not options.is_llava and asked is None:
        log("the run's prompt follows the checkpoint's chat template (--template voco_v1: the released code's)")
    return [f"{file}: {TODAY}"] if "strftime_now" in text else []


def has_voco_row(source: Source, voco: int) -> bool:
    """Whether the last row is a trained one for `<voco>`, though the tokenizer does not know the token.

    So it is in a released VoCo-LLaMA. In other formats a row without a token is padding.
    """
    tensor = source.tensors.get((EMBEDDING, None))
    return source.format == "voco" and tensor is not None and tensor.shape[0] == voco + 1 and tensor.read()[voco].any()


def parameter_maker(
    source: Source, options: Options, findings: Findings, drawn: dict, fresh: set[int], tokens: Collection[int],
    vocab_size: int,
) -> Callable:  # fmt: skip
    """A function of (path and shape of our parameter) that gives the `Parameter` to read from the source.

    `drawn`: random parameters, by path, of parts that the source lacks; `fresh`: tokens that get new rows though the
    source has some; `tokens`: those that it knows; `vocab_size`: rows without padding.
    """
    dtype = DTYPES[options.dtype] if options.dtype else None

    def parameter(path: str, shape: tuple[int, ...]) -> Parameter:
        if path in drawn:
            values = np.asarray(drawn[path])
            return Parameter(values.shape, values.dtype, False, lambda _: values)
        rule = BY_OURS[path]
        wanted = dtype or source.tensors[path, 0 if rule.stacked else None].dtype

        def read(layer: int) -> np.ndarray:
            key = path, layer if rule.stacked else None
            values = findings.check(source.names[key], source.tensors[key].read(), wanted)
            if path in VOCABULARY:
                padded_rows = rule.transform.their_shape(shape)[0]
                std, seed = source.llama.initializer_range, (options.seed, VOCABULARY.index(path))
                init = options.voco_init
                values = with_fresh_rows(values, vocab_size, fresh, init, std, seed, padded_rows, tokens)
            return rule.transform.to_ours(values, shape[1:] if rule.stacked else shape)

        return Parameter(shape, wanted, rule.stacked, read)

    return parameter


def run_config(source: Source, vocabulary: int, options: Options, run: Path) -> ConfigDict:
    """The config of the run: the source's dimensions, and defaults of VoCo training for the rest."""
    config = default_config()
    with config.unlocked():
        rows = max(vocabulary, source.llama.vocab_size)
        llama = dataclasses.replace(source.llama, vocab_size=rows, vocab_multiple=options.vocab_multiple)
        config.model.llama = ConfigDict(dataclasses.asdict(llama), convert_dict=True)
        if source.vision is not None:
            config.model.vision = ConfigDict(dataclasses.asdict(source.vision), convert_dict=True)
        elif options.vision is not None:
            config.model.vision = vision_preset(options.vision)
        dtypes = {tensor.dtype.name for tensor in source.tensors.values()}
        # Parts may differ; what they are restored to must hold the values of all
        config.model.param_dtype = options.dtype or (dtypes.pop() if len(dtypes) == 1 else "float32")
        config.model.projector_layers = source.projector_layers
        config.model.projector_bias = source.projector_bias
        default = 0 if options.is_llava else 1
        config.model.num_voco_tokens = default if options.num_voco_tokens is None else options.num_voco_tokens
        config.model.compressor = options.compressor
        config.tokenizer.source = str(run / "tokenizer")
        if source.processor is not None:
            set_processor(config, source.processor)
        config.data.row_length = min(2048, llama.max_position_embeddings)
        config.eval.max_new_tokens = 64
        config.eval.batch_size = 8
    return config
