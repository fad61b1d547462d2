"""What a config says of the model's input: the model's config with a tokenizer's vocabulary, pixels and prompts."""

from ml_collections import ConfigDict

from voco_jax.chat_templates import CHAT_TEMPLATES, CUSTOM, SYSTEM, TOKENIZER, ChatTemplate, get_chat_template
from voco_jax.config import typed
from voco_jax.data.conversations import Encoder
from voco_jax.data.images import ImageProcessor
from voco_jax.data.template_reader import (
    chat_template_text,
    fitting_templates,
    missing_tokens,
    named_alike,
    read_chat_template,
)
from voco_jax.data.tokenizer import prompt_ids
from voco_jax.errors import UserError
from voco_jax.models import build
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.models.config import model_error
from voco_jax.models.voco import VoCoConfig

_OF_TOKENIZER = ("voco_token_id", "prefix_ids", "suffix_ids")


def make_model_config(config: ConfigDict, tokenizer) -> VoCoConfig:
    """The model that a config and a tokenizer describe, as `models/build.py` makes it; UserError names a wrong value.

    Without a tokenizer (None), for estimates, the vocabulary is the config's, and Llama's tokens are around an image.
    """
    model, prompt = typed(config).model, {}
    if tokenizer is not None:
        ids, size = prompt_ids(tokenizer), len(tokenizer)
        if config.tokenizer.source != "train":  # a pretrained model only gets rows for added tokens
            size = max(size, model.llama.vocab_size)
        prompt = dict(vocab_size=size, **{name: getattr(ids, name) for name in _OF_TOKENIZER})
    try:
        return build.make_model_config(model, **prompt)
    except ValueError as error:
        raise model_error(error) from None


def check_elastic_k(config: ConfigDict) -> None:
    """UserError for numbers of VoCo tokens in `train.elastic_k` of which text cannot read the first so many."""
    numbers, model = config.train.elastic_k, config.model
    if not numbers:
        return
    if not make_model_config(config, None).compress_length:
        expected = "expected config.model.compressor 'voco', or another that makes VoCo tokens one after the other"
        raise UserError(f"config.train.elastic_k: {expected}; found {model.compressor!r}")
    if wrong := [k for k in numbers if not 1 <= k <= model.num_voco_tokens]:
        expected = f"expected numbers from 1 to {model.num_voco_tokens} (config.model.num_voco_tokens)"
        raise UserError(f"config.train.elastic_k: {expected}, found {wrong[0]}")
    if max(numbers) != model.num_voco_tokens:
        expected = f"expected {model.num_voco_tokens} (config.model.num_voco_tokens) as the largest"
        raise UserError(f"config.train.elastic_k: {expected}, found {max(numbers)}: more would never be trained")


# Keys of `config.data.processor` whose names in ImageProcessor are others
_PROCESSOR_FIELDS = {"image_mean": "mean", "image_std": "std"}


def make_processor(config: ConfigDict) -> ImageProcessor:
    """What makes pixel values of a picture; UserError names a value that cannot be."""
    data = config.data
    fields = {_PROCESSOR_FIELDS.get(key, key): value for key, value in data.processor.items()}
    try:
        return ImageProcessor(
            config.model.vision.image_size,
            data.aspect_ratio,
            transparency=data.transparency,
            max_pixels=data.limits.picture_pixels,
            max_side=data.limits.picture_side,
            grid=data.image_grid,
            **fields,
        )
    except ValueError as error:
        raise UserError(f"config.data.{error}") from None


def set_processor(config: ConfigDict, processor: ImageProcessor) -> None:
    """Write a processor into a config, for `make_processor` to make it again."""
    config.data.update(aspect_ratio=processor.aspect_ratio, transparency=processor.transparency)
    for key in config.data.processor:
        config.data.processor[key] = getattr(processor, _PROCESSOR_FIELDS.get(key, key))


def make_encoder(config: ConfigDict, tokenizer, model_config: VoCoConfig) -> Encoder:
    """The prompt rules of a config for the kind of visual tokens its model has.

    UserError for a template of control tokens that the tokenizer lacks, and for a system text that has no place in it.
    """
    template, name = template_of(config), config.data.template
    if name in CHAT_TEMPLATES and (missing := missing_tokens(template, tokenizer)):
        raise UserError(
            f"config.data.template: {name!r} needs a tokenizer with the token {missing[0]!r}; this one has none"
        )
    if config.data.system is not None and not template.with_system:
        key = "; config.data.custom_template.with_system says where" if name == CUSTOM else ""
        raise UserError(f"config.data.system: template {name!r} has no place for a system text{key}")
    return Encoder(
        tokenizer=tokenizer,
        template=template,
        num_voco_tokens=model_config.num_voco_tokens if model_config.compressor_class.has_voco_tokens else 0,
        num_visual_tokens=model_config.num_visual_tokens,
        compressed=model_config.has_compress_stream,
        verbatim=is_llava(config),
        system=config.data.system,
        image_position=config.data.image_position,
    )


def is_llava(config: ConfigDict) -> bool:
    """Whether a config's model is plain LLaVA, in whose text no VoCo tokens stand."""
    return COMPRESSORS[config.model.compressor].keeps_text(config.model.num_voco_tokens)


def reads_whole(config: ConfigDict, teacher: ConfigDict) -> bool:
    """Whether a teacher of the same tokenizer can read the rows of a config whole (`models/read.py`): its own prompt is
    the same text, VoCo tokens included. If not, it needs rows of its own."""
    has_slots = make_model_config(config, None).compress_length > 0
    has_voco_tokens = COMPRESSORS[teacher.model.compressor].has_voco_tokens and not is_llava(teacher)
    ours, theirs = (
        (template_of(one), one.data.system, one.data.image_position) for one in (config, teacher)
    )  # fmt: skip
    return has_slots and has_voco_tokens and ours == theirs


def template_of(config: ConfigDict) -> ChatTemplate:
    """The text around a conversation's turns; UserError for one that has not one place for a system text."""
    template = get_chat_template(config.data.template, config.data.custom_template)
    if template.with_system and template.with_system.count(SYSTEM) != 1:
        expected = f"expected {SYSTEM!r} in it once, or '' for no place"
        raise UserError(f"config.data.custom_template.with_system: {expected}; found {template.with_system!r}")
    return template


def take_template(config: ConfigDict, tokenizer) -> list[str]:
    """Write the tokenizer's own chat template into a config that asks for it and has it not yet: of a run that begins
    (`begin_with_run` refuses texts beside it), not of one that goes on. Returns warnings.

    UserError for a tokenizer without one, and for one that cannot be followed.
    """
    data = config.data
    if data.template != TOKENIZER or template_of(config) != ChatTemplate():
        return []
    key, name = f"config.data.template: {TOKENIZER!r}", tokenizer.name_or_path or "this one"
    text = chat_template_text(tokenizer)
    if text is None:
        raise UserError(f"{key}: expected a tokenizer with a chat template; {name} has none")
    try:
        template = read_chat_template(text, tokenizer)
    except UserError as error:
        alike = named_alike(text, tokenizer, about_images=is_llava(config))
        names = ", ".join(fitting_templates(tokenizer))
        hint = f"{alike!r} asks a first question alike" if alike else f"name one of {names}"
        raise UserError(f"{key}: the chat template of {name} cannot be followed ({error}); {hint}") from None
    set_template(data, template)
    return [TODAY] if "strftime_now" in text else []


TODAY = "the chat template prints today's date; the run keeps the date of today"


def set_template(data: ConfigDict, template: ChatTemplate, name: str = TOKENIZER) -> None:
    """Store a template, of no name in the table, in `config.data`."""
    data.template = name
    data.custom_template.update({key: getattr(template, key) for key in data.custom_template})
