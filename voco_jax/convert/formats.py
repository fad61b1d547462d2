"""The formats a checkpoint comes in: what each puts before the families' names, and what may be passed over."""

from collections.abc import Collection, Iterable
import dataclasses
import functools
import re

from voco_jax.convert.families import BY_OURS, RULES, clip
from voco_jax.convert.rules import Rule


@dataclasses.dataclass(frozen=True)
class Format:
    """Prefixes by part. `projector_names` are the linear layers': a Sequential numbers them 0 and 2; one has none."""

    name: str
    llm: str
    head: str
    projector: str
    vision: str
    projector_names: tuple[str, str] = ("linear_1.", "linear_2.")

    def their_name(self, rule: Rule, layer: int | None = None) -> str:
        """The tensor's whole name in this format."""
        name = rule.theirs if layer is None else rule.theirs.format(layer)
        if rule.part == "projector":
            for ours, theirs in zip(("linear_1.", "linear_2."), self.projector_names, strict=True):
                name = name.replace(ours, theirs)
        return getattr(self, rule.part) + name


_LLAVA_VISION = "model.vision_tower.vision_tower.vision_model."
_SEQUENTIAL, _SINGLE = ("0.", "2."), ("", "linear_2.")

# The first of each name is the one that is written.
FORMATS = (
    Format("voco", "model.", "", "model.mm_projector.", _LLAVA_VISION, _SEQUENTIAL),
    Format(
        "llava-hf", "language_model.model.", "language_model.", "multi_modal_projector.", "vision_tower.vision_model."
    ),
    # transformers 5 writes the vision tower without its own prefix, …
    Format("llava-hf", "language_model.model.", "language_model.", "multi_modal_projector.", "vision_tower."),
    # … and from 4.52 on a state dict has these names.
    Format("llava-hf", "model.language_model.", "", "model.multi_modal_projector.", "model.vision_tower.vision_model."),
    Format("llava-hf", "model.language_model.", "", "model.multi_modal_projector.", "model.vision_tower."),
)
LLAVA_LINEAR = dataclasses.replace(FORMATS[0], projector_names=_SINGLE)  # the first LLaVA's projector
LLAMA = Format("llama", "model.", "", "", "")
VISION = (Format("clip", "", "", "", "vision_model."), Format("clip", "", "", "", ""))
_PROJECTOR_PREFIXES = ("model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector.", "")
PROJECTOR = (
    *(Format("projector", "", "", prefix, "", _SEQUENTIAL) for prefix in _PROJECTOR_PREFIXES),
    *(Format("projector", "", "", prefix, "", _SINGLE) for prefix in _PROJECTOR_PREFIXES),
    Format("projector", "", "", "multi_modal_projector.", ""),
)

# Buffers that are computed, not trained
_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|(.*\.)?embeddings\.position_ids")


def passed_over(name: str, format: Format) -> bool:
    """Whether a tensor is rightly left out."""
    return bool(_BUFFERS.fullmatch(name) or format.name == "clip" and re.fullmatch(clip.NOT_READ, name))


def num_projector_layers(format: Format) -> int:
    """Linear layers of a projector by its tensors' names, where no config says so."""
    return 1 if format.projector_names == _SINGLE else 2


def key_of_name(name: str) -> tuple[str, int | None] | None:
    """(our parameter's path, layer) of a tensor's name in any of the formats; None for a name of none."""
    found = re.fullmatch(r"(.*\.layers\.)(0|[1-9]\d{0,8})(\..*)", name)
    ours = _all_names().get(f"{found[1]}{{}}{found[3]}" if found else name)
    return None if ours is None else (ours, int(found[2]) if found else None)


@functools.cache
def _all_names() -> dict[str, str]:
    """Our parameter by its name in any of the formats, in which `{}` is for the layer."""
    formats = (*FORMATS, LLAVA_LINEAR, LLAMA)
    return {format.their_name(rule): rule.ours for format in formats for rule in RULES}


# A parameter of each part by which a format is recognised; all families have it
_TOLD_BY = {
    "llm": "llama.embed_tokens.embedding",
    "projector": "projector.linear_1.kernel",
    "vision": "vision_tower.position_embedding",
}


def recognise(names: Collection[str], formats: Iterable[Format], parts: Iterable[str]) -> Format | None:
    """The first format under whose names all the parts are found; None where no format has them."""
    told_by = [BY_OURS[_TOLD_BY[part]] for part in parts]
    return next((format for format in formats if all(format.their_name(rule) in names for rule in told_by)), None)
