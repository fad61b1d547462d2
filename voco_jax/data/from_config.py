"""What a config says of the model's input: the model's config with a tokenizer's vocabulary, pixels and prompts."""

import dataclasses

from ml_collections import ConfigDict

from voco_jax.chat_templates import ChatTemplate, get_chat_template
from voco_jax.config import typed
from voco_jax.data.conversations import Encoder
from voco_jax.data.images import ImageProcessor
from voco_jax.data.tokenizer import prompt_ids
from voco_jax.errors import UserError
from voco_jax.models.build import resolve_dtype
from voco_jax.models.voco import VoCoConfig


def make_model_config(config: ConfigDict, tokenizer) -> VoCoConfig:
    """The model that a config and a tokenizer describe; UserError names a value that cannot be.

    Without a tokenizer (None), for estimates: the vocabulary is the config's, around an image stand Llama's tokens."""
    try:
        m = typed(config).model
        llama = m.llama
        prompt: dict = {"voco_token_id": llama.vocab_size - 1}
        if tokenizer is not None:
            # A tokenizer trained with the model sets its vocabulary; a pretrained one may need rows for added tokens.
            if llama.vocab_size < len(tokenizer) or config.tokenizer.source == "train":
                llama = dataclasses.replace(llama, vocab_size=len(tokenizer))
            ids = prompt_ids(tokenizer)
            prompt = {name: getattr(ids, name) for name in ("voco_token_id", "prefix_ids", "suffix_ids")}
        return VoCoConfig(
            llama=llama,
            vision=m.vision,
            compressor=m.compressor,
            num_voco_tokens=m.num_voco_tokens,
            **prompt,
            num_compressed_tokens=m.num_compressed_tokens,
            num_qformer_layers=m.num_qformer_layers,
            projector_layers=m.projector_layers,
            dtype=resolve_dtype(m.dtype),
            param_dtype=resolve_dtype(m.param_dtype, "param_dtype"),
            attention=m.attention,
            remat=m.remat,
            unroll_layers=m.unroll_layers,
            lora=m.lora if m.lora.rank else None,
        )
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None


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
    external = model_config.compressor in ("average_pool", "qformer")
    return Encoder(
        tokenizer=tokenizer,
        template=template_of(config),
        num_voco_tokens=0 if external else model_config.num_voco_tokens,
        num_visual_tokens=model_config.num_visual_tokens,
        compressed=model_config.compressor == "voco",
        verbatim=is_llava(config),
    )


def is_llava(config: ConfigDict) -> bool:
    """Whether a config's model is plain LLaVA, in whose text no VoCo tokens stand."""
    return config.model.compressor == "none" and not config.model.num_voco_tokens


def template_of(config: ConfigDict) -> ChatTemplate:
    """The text around a conversation's turns."""
    return get_chat_template(config.data.template, config.data.custom_template)
