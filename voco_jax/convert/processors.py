"""Image processors' files, to our `ImageProcessor` and back: the same pixels, or an error that names the key.

transformers stores a processor in `preprocessor_config.json`, and from version 5 on in `processor_config.json` under
`image_processor`. The pixels are those of its Pillow classes, which the released LLaVA code uses too. Its torchvision
classes ("Fast" before version 5) have the same fields; their resized values differ slightly.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
import re
from typing import Any, NoReturn

from PIL import Image

from voco_jax.convert.config_keys import Keys
from voco_jax.convert.families.llava import hf_strategy
from voco_jax.convert.findings import listing
from voco_jax.data.images import ImageProcessor
from voco_jax.errors import UserError
from voco_jax.io.json_files import read_object
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened

_ALL = {
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_pad": False,
    "size": {"shortest_edge": 224}, "crop_size": 224, "pad_size": None, "resample": 3, "rescale_factor": 1 / 255,
    "image_mean": ImageProcessor.mean, "image_std": ImageProcessor.std, "default_to_square": False,
    "use_square_size": False,
}  # fmt: skip

# Fields that are computed, with their defaults (also for null), by `image_processor_type` without 'Fast' or 'Pil'
DEFAULTS = {
    "CLIPImageProcessor": _ALL,
    "LlavaImageProcessor": _ALL,  # its do_pad pads to a square with the mean colour, before all else
    "SiglipImageProcessor": _ALL
    | {
        "do_center_crop": False, "size": {"height": 224, "width": 224}, "image_mean": (0.5,) * 3,
        "image_std": (0.5,) * 3,
    },
    # Of the whole picture, which comes before the tiles. Their do_pad is about tiles
    "LlavaNextImageProcessor": _ALL,
    "LlavaOnevisionImageProcessor": _ALL | {"do_center_crop": False, "size": {"height": 384, "width": 384}},
}  # fmt: skip
_TILED = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")

# Fields that change no pixel. do_convert_rgb is one: our images are always RGB.
_HARMLESS = re.compile(
    "image_processor_type|feature_extractor_type|_?processor_class|do_convert_rgb|(input_)?data_format|return_tensors|"
    "device|disable_grouping|image_seq_length|use_fast|backend|model_input_names|_valid_(processor_keys|kwargs_names)|"
    "_?name_or_path|transformers_version|_commit_hash"
)
_KEYS = Keys(frozenset(_ALL), {}, _HARMLESS)
# The first LLaVA-NeXT checkpoints name the way to cut tiles; no version of transformers reads it
_TILES_KEYS = Keys(frozenset(_ALL) | {"image_grid_pinpoints"}, {"aspect_ratio_setting": ("anyres",)}, _HARMLESS)
# Fields of processor_config.json itself, which are about text
_TEXT_KEYS = frozenset(
    {
        "image_processor", "image_token", "chat_template", "num_additional_image_tokens", "num_image_tokens",
        "video_processor", "video_token", "vision_aspect_ratio",
    }
)  # fmt: skip


def processor_of_llava_hf(directory: Path, vision: ViTConfig, ignored: Collection[str] = ()) -> ImageProcessor:
    """The processor of a Hugging Face LLaVA. Where it has none, images are padded, as in LLaVA-1.5's training,
    and then prepared as for CLIP or SigLIP.

    `ignored`: unknown keys to accept. UserError for what is not computed here, and for another image size than the
    vision tower's.
    """
    file = directory / "processor_config.json"
    if file.exists():
        expected = {"patch_size": (vision.patch_size,), "vision_feature_select_strategy": (hf_strategy(vision),)}
        Keys(_TEXT_KEYS, expected, _HARMLESS).check(read_object(file), file, ignored=ignored)
    found = _find(directory)
    if found is None:
        return processor_of_tower([], vision)
    return processor_from_hf(*found, vision.image_size, "LlavaImageProcessor", ignored=ignored)


def processor_of_llava(
    fields: Mapping, file: Path, tower: Path | None, vision: ViTConfig, ignored: Collection[str] = ()
) -> ImageProcessor:
    """The processor of a released LLaVA: config.json says whether to pad; the vision tower's processor follows.

    That one is in the `tower`'s directory, or beside the config; else it is CLIP's or SigLIP's. UserError as above.
    """
    ratio = fields.get("image_aspect_ratio")
    if ratio not in ("pad", "square", None):
        raise UserError(f"{file}: image_aspect_ratio: expected 'pad' or 'square' or None, found {shortened(ratio)}")
    return processor_of_tower([tower, file.parent], vision, pad=ratio == "pad", transparency="drop", ignored=ignored)


def processor_of_tower(
    directories: Iterable[Path | None],
    vision: ViTConfig,
    *,
    pad: bool = True,
    transparency: str = "white",
    ignored: Collection[str] = (),
) -> ImageProcessor:
    """The first image processor in the directories, after padding. Without one, it is that of CLIP, and of a tower
    without class token SigLIP's. UserError as above."""
    found = next(filter(None, (_find(directory) for directory in directories if directory)), None)
    size, kind = vision.image_size, "CLIPImageProcessor" if vision.class_token else "SiglipImageProcessor"
    sides = size if vision.class_token else {"height": size, "width": size}
    fields, where = found or ({"size": sides, "crop_size": size}, "")
    return processor_from_hf(fields, where, size, kind, pad=pad, transparency=transparency, ignored=ignored)


def _find(directory: Path) -> tuple[dict, str] | None:
    """(fields, what to write before a key in messages) of a directory's image processor, if there is one."""
    file = directory / "processor_config.json"
    if file.exists() and "image_processor" in (outer := read_object(file)):
        if not isinstance(fields := outer["image_processor"], dict):
            raise UserError(f"{file}: image_processor: expected an object, found {shortened(fields)}")
        return fields, f"{file}: image_processor."
    file = directory / "preprocessor_config.json"
    return (read_object(file), f"{file}: ") if file.exists() else None


def processor_from_hf(
    fields: Mapping, where: str, image_size: int, kind: str = "CLIPImageProcessor", *, pad: bool = False,
    transparency: str = "white", ignored: Collection[str] = (),
) -> ImageProcessor:  # fmt: skip
    """The processor that has these fields. `kind`: its type, if they do not name it; `pad`: pad whatever they say.

    UserError as above, with `where` before the key.
    """
    read = _Fields(fields, where, kind, ignored)
    square, shown = (image_size, image_size), f"{image_size} × {image_size} pixels, as the vision tower takes"
    resized = read.sides("size", square=False) if read.flag("do_resize") else ()
    if read.kind in _TILED and len(resized) == 1:  # the whole picture is resized to a square, not cut
        resized *= 2
    if read.flag("default_to_square") and isinstance(read.values["size"], int):  # versions of transformers differ
        read.refuse("default_to_square", "false, or a size with height and width")
    if read.flag("do_pad"):
        if read.kind == "LlavaImageProcessor":
            pad = True
        elif (
            read.kind not in _TILED
            and read.values["pad_size"] is not None
            and read.sides("pad_size", square=True) != square
        ):
            read.refuse("pad_size", shown)
    if read.flag("use_square_size"):
        read.refuse("use_square_size", "false")
    if read.flag("do_center_crop"):
        if read.sides("crop_size", square=True) != square:
            read.refuse("crop_size", shown)
    elif not resized or (len(resized) == 1 and not pad):
        read.refuse("do_center_crop", "true, or a size with height and width: pictures would not be square")
    elif resized not in (square, square[:1]):
        read.refuse("size", shown)

    mean, std = read.numbers("image_mean", 3), read.numbers("image_std", 3)
    colour = tuple(int(value * 255) for value in mean)
    if not read.flag("do_normalize"):
        mean, std = [0.0] * 3, [1.0] * 3
    if pad and len(resized) == 2 and resized[0] == resized[1]:
        resized = resized[:1]
    try:
        return ImageProcessor(
            image_size,
            "pad" if pad else "stretch" if len(resized) == 2 else "crop",
            (mean[0], mean[1], mean[2]),
            (std[0], std[1], std[2]),
            resize_to=() if resized in (square, square[:1]) else resized,
            do_resize=read.flag("do_resize"),
            resample=read.filter(),
            rescale_factor=read.numbers("rescale_factor", 1)[0] if read.flag("do_rescale") else 1.0,
            pad_color=colour if pad and colour != tuple(int(value * 255) for value in mean) else (),
            transparency=transparency,
        )
    except ValueError as error:
        raise UserError(f"{where}{str(error).removeprefix('processor.')}") from None


class _Fields:
    """An image processor's fields, with defaults. UserError for unknown fields and wrong values."""

    def __init__(self, fields: Mapping, where: str, kind: str, ignored: Collection[str]):
        self._where = where
        named = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or kind)
        self.kind = named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        if self.kind not in DEFAULTS:
            raise UserError(f"{where}image_processor_type: expected {' or '.join(DEFAULTS)}, found {shortened(named)}")
        given = {key: value for key, value in fields.items() if value is not None}
        self.values = DEFAULTS[self.kind] | given
        steps = {key: value for key, value in given.items() if value is not False or not key.startswith("do_")}
        keys = _TILES_KEYS if self.kind in _TILED else _KEYS
        if problems := keys.problems(steps, where, ignored):
            raise UserError(listing(problems))

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise UserError(f"{self._where}{key}: expected {expected}; found {shortened(self.values[key])}")

    def flag(self, key: str) -> bool:
        if not isinstance(self.values[key], bool):
            self.refuse(key, "true or false")
        return self.values[key]

    def numbers(self, key: str, count: int) -> list[float]:
        """As many numbers; a single one stands for all."""
        values = self.values[key]
        values = [values] * count if _is_number(values) else values
        if not isinstance(values, list | tuple) or len(values) != count or not all(map(_is_number, values)):
            self.refuse(key, f"{count} numbers" if count > 1 else "a number")
        return [float(value) for value in values]

    def filter(self) -> str:
        """Pillow's name of `resample`."""
        value = self.values["resample"]
        names = {filter.value: filter.name.lower() for filter in Image.Resampling}
        if type(value) is not int or value not in names:
            self.refuse("resample", f"one of Pillow's filters, {min(names)} … {max(names)}")
        return names[value]

    def sides(self, key: str, *, square: bool) -> tuple[int, ...]:
        """(shortest edge,) or (height, width) in pixels. `square`: a single number is both sides."""
        value = self.values[key]
        if isinstance(value, dict):
            given = {name: side for name, side in value.items() if side is not None}
            names = ("height", "width") if key != "size" or "height" in given else ("shortest_edge",)
            sides = tuple(given.pop(name, None) for name in names)
            sides = () if given else sides
        elif isinstance(value, list) and len(value) == 2:
            sides = tuple(value)
        else:
            sides = (value, value) if square else (value,)
        if not sides or not all(type(side) is int and 0 < side < 2**14 for side in sides):
            self.refuse(key, "height and width in pixels" + (", or shortest_edge alone" if key == "size" else ""))
        return sides


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


# ---- Back ----------------------------------------------------------------------------------------------------------


def processor_to_hf(processor: ImageProcessor, run: Path, format_name: str) -> dict:
    """`preprocessor_config.json`, which all versions of transformers read; UserError for what it cannot say.

    With format `voco` it is that of the vision tower: the released code pads by itself, before it.
    """
    size, pad = processor.size, processor.aspect_ratio == "pad"
    mean, normalize = processor.mean, True
    if pad and processor.pad_color and processor.pad_color != tuple(int(value * 255) for value in mean):
        if any(mean) or processor.std != (1, 1, 1):
            raise UserError(
                f"{run / 'config.json'}: data.processor.pad_color: transformers pads with the mean colour alone, found "
                f"{processor.pad_color}"
            )
        red, green, blue = ((level + 0.5) / 255 for level in processor.pad_color)
        mean, normalize = (red, green, blue), False
    sides = processor.resize_to or (size,)
    square = processor.aspect_ratio != "stretch" and len(sides) == 1
    kind: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
    if format_name == "llava-hf" and pad:
        kind |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    elif format_name == "llava-hf" and not square and sides == (size,) and processor.do_resize:
        kind = {"image_processor_type": "SiglipImageProcessor"}
    return kind | {
        "size": {"shortest_edge": sides[0]} if square else {"height": sides[0], "width": sides[-1]},
        **({"crop_size": {"height": size, "width": size}} if "do_center_crop" in kind else {}),
        "do_resize": processor.do_resize,
        "do_rescale": True,
        "do_normalize": normalize,
        "do_convert_rgb": True,
        "resample": int(processor.filter),
        "rescale_factor": processor.rescale_factor,
        "image_mean": list(mean),
        "image_std": list(processor.std),
    }
