"""The formats of checkpoints: the prefixes of their tensors' names, and tensors that need not be read."""

from collections.abc import Collection, Iterable
import dataclasses
import functools
from pathlib import Path
import re

from voco_jax.convert.families import BY_OURS, RULES
from voco_jax.convert.families.vision import VisionFamily
from voco_jax.convert.rules import Rule
from voco_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Format:
    """Prefixes of each part's tensors. `projector_names`: of its linear layers; in a Sequential '0.', '2.' and '4.'."""

    name: str
    llm: str
    head: str
    projector: str
    vision: str
    projector_names: tuple[str, ...] = ()  # as ours

    def their_name(self, rule: Rule, layer: int | None = None) -> str:
        """The tensor's whole name in this format."""
        name = rule.theirs if layer is None else rule.theirs.format(layer)
        if rule.part == "projector":
            for number, theirs in enumerate(self.projector_names, start=1):
                name = name.replace(f"linear_{number}.", theirs)
        return getattr(self, rule.part) + name


_LLAVA_VISION = "model.vision_tower.vision_tower.vision_model."
_SEQUENTIAL, _SINGLE = ("0.", "2.", "4."), ("",)

# The first format of each name is the one that is written
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
VISION = (Format("vision", "", "", "", "vision_model."), Format("vision", "", "", "", ""))
_PROJECTOR_PREFIXES = ("model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector.", "")
PROJECTOR = (
    *(Format("projector", "", "", prefix, "", _SEQUENTIAL) for prefix in _PROJECTOR_PREFIXES),
    *(Format("projector", "", "", prefix, "", _SINGLE) for prefix in _PROJECTOR_PREFIXES),
    Format("projector", "", "", "multi_modal_projector.", ""),
)

# Buffers, which are computed
_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|(.*\.)?embeddings\.position_ids")


def passed_over(name: str, format: Format, tower: VisionFamily | None = None) -> bool:
    """Whether a tensor need not be read; `tower`: the family of the vision tower, where that is among the parts."""
    if tower is None:
        return bool(_BUFFERS.fullmatch(name))
    patterns = [_BUFFERS.pattern, re.escape(format.vision) + tower.POOLING] + [tower.NOT_READ] * (
        format.name == "vision"
    )
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def key_of_name(name: str) -> tuple[str, int | None] | None:
    """(our parameter's path, layer) of a tensor's name in any format; None for an unknown name."""
    found = re.fullmatch(r"(.*\.layers\.)(0|[1-9]\d{0,8})(\..*)", name)
    ours = _all_names().get(f"{found[1]}{{}}{found[3]}" if found else name)
    return None if ours is None else (ours, int(found[2]) if found else None)


@functools.cache
def _all_names() -> dict[str, str]:
    """Our parameter's path by its name in any format, with `{}` for the layer."""
    formats = (*FORMATS, LLAVA_LINEAR, LLAMA)
    return {format.their_name(rule): rule.ours for format in formats for rule in RULES}


# A parameter of each part that all families have, by which a format is recognised
_TOLD_BY = {
    "llm": "llama.embed_tokens.embedding",
    "projector": "projector.linear_1.kernel",
    "vision": "vision_tower.position_embedding",
}


def recognise(
    names: Collection[str], formats: Iterable[Format], parts: Iterable[str], where: Path | str, expected: str
) -> Format:  # fmt: skip
    """The first format in which all these parts are found. UserError if there is none: `where` … `expected` …"""
    told_by = [BY_OURS[_TOLD_BY[part]] for part in parts]
    for format in formats:
        if all(format.their_name(rule) in names for rule in told_by):
            return format
    raise UserError(f"{where}: expected {expected}, found {min(names, default='none')}")
