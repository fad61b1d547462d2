"""What a config says of the model's input: the model's config with a tokenizer's vocabulary, pixels and prompts."""

from ml_collections import ConfigDict

from voco_jax.chat_templates import ChatTemplate, get_chat_template
from voco_jax.config import typed
from voco_jax.data.conversations import Encoder
from voco_jax.data.images import ImageProcessor
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
    """The prompt rules of a config for the kind of visual tokens its model has."""
    return Encoder(
        tokenizer=tokenizer,
        template=template_of(config),
        num_voco_tokens=model_config.num_voco_tokens if model_config.compressor_class.has_voco_tokens else 0,
        num_visual_tokens=model_config.num_visual_tokens,
        compressed=model_config.has_compress_stream,
        verbatim=is_llava(config),
    )


def is_llava(config: ConfigDict) -> bool:
    """Whether a config's model is plain LLaVA, in whose text no VoCo tokens stand."""
    return COMPRESSORS[config.model.compressor].keeps_text(config.model.num_voco_tokens)


def reads_whole(config: ConfigDict, teacher: ConfigDict) -> bool:
    """Whether a teacher of the same tokenizer can read the rows of a config whole (`models/read.py`): its own prompt is
    the same text, VoCo tokens included. If not, it needs rows of its own."""
    has_slots = make_model_config(config, None).compress_length > 0
    has_voco_tokens = COMPRESSORS[teacher.model.compressor].has_voco_tokens and not is_llava(teacher)
    return has_slots and has_voco_tokens and template_of(config) == template_of(teacher)


def template_of(config: ConfigDict) -> ChatTemplate:
    """The text around a conversation's turns."""
    return get_chat_template(config.data.template, config.data.custom_template)
