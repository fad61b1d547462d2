"""A checkpoint as it comes: which format it is, its dimensions, and its tensors under the names of `rules.py`."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from pathlib import Path
import re

from voco_jax.convert import processors
from voco_jax.convert.adapters import Key, apply_adapter, base_of, check_same_model, is_adapter, replace, trained_beside
from voco_jax.convert.config_keys import section
from voco_jax.convert.families import LANGUAGE_MODELS, RULES, clip, language_family, llava, vision_family
from voco_jax.convert.formats import (
    FORMATS,
    LLAMA,
    LLAVA_LINEAR,
    PROJECTOR,
    VISION,
    Format,
    num_projector_layers,
    passed_over,
    recognise,
)
from voco_jax.convert.gguf_files import read_gguf
from voco_jax.convert.tensors import inside, name_leads_out, same_bytes
from voco_jax.convert.torch_files import read_torch
from voco_jax.convert.vocabulary import EMBEDDING, HEAD
from voco_jax.data.images import ImageProcessor
from voco_jax.errors import UserError
from voco_jax.io.files import readable
from voco_jax.io.json_files import read_object
from voco_jax.io.safetensors import read_index, read_safetensors
from voco_jax.io.tensors import Tensor
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened


@dataclasses.dataclass
class Source:
    """`tensors` holds the whole checkpoint; a part that is None or empty is not in it."""

    format: str
    path: Path
    llama: LlamaConfig
    vision: ViTConfig | None = None
    tokenizer: Path | None = None
    tensors: dict[Key, Tensor] = dataclasses.field(default_factory=dict)
    names: dict[Key, str] = dataclasses.field(default_factory=dict)  # as the checkpoint has them
    problems: list[str] = dataclasses.field(default_factory=list)  # unknown, doubled
    processor: ImageProcessor | None = None  # None: the default, as for all that brings no vision tower
    whole: bool = False  # of a format that has all parts; others may come without vision tower and projector
    projector_layers: int = 2
    notes: list[str] = dataclasses.field(default_factory=list)  # what was not read, though it is there

    def parts(self) -> set[str]:
        return {path.split(".")[0] for path, _ in self.tensors}

    def missing_parts(self) -> list[str]:
        expected = ("llama", "projector", "vision_tower") if self.whole else ("llama",)
        return [part for part in expected if part not in self.parts()]

    def take(self, tensors: Mapping[str, Tensor], format: Format, parts: tuple[str, ...]) -> None:
        """Sort tensors under our names; those of other parts, unknown ones and doubles become problems."""
        left = dict(tensors)
        layers = {
            "llm": self.llama.num_hidden_layers,
            "vision": self.vision.num_hidden_layers if self.vision else 0,
        }
        for rule in RULES:
            if rule.part not in parts:
                continue
            for layer in range(layers[rule.part]) if rule.stacked else (None,):
                name = format.their_name(rule, layer)
                if name not in left:
                    continue  # what is missing shows itself when the model is filled
                key = rule.ours, layer
                if key in self.tensors:
                    self.problems.append(f"{name} doubled ({self.tensors[key].file.name}, {left[name].file.name})")
                self.tensors[key], self.names[key] = left.pop(name), name
        if "head" in parts and self.llama.tie_word_embeddings:
            self._drop_tied_head()
        self.problems += [f"{name} unknown ({left[name].file.name})" for name in left if not passed_over(name, format)]

    def _drop_tied_head(self) -> None:
        """Some writers store the head of tied embeddings too: the same values a second time, or a contradiction."""
        head, embedding = (self.tensors.get((path, None)) for path in (HEAD, EMBEDDING))
        if head is None or embedding is None:
            return
        del self.tensors[HEAD, None]
        name = self.names.pop((HEAD, None))
        if head.shape != embedding.shape or not same_bytes(head.read(), embedding.read()):
            self.problems.append(f"{name} differs from the embedding, but tie_word_embeddings is set")


_WEIGHTS = (("model", ".safetensors", read_safetensors), ("pytorch_model", ".bin", read_torch))


def read_directory(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory: safetensors or PyTorch files, in one piece or several with an index.

    Of both kinds safetensors are read, as transformers does. UserError where one file and an index could both be meant.
    """
    for stem, suffix, read in _WEIGHTS:
        index, file = directory / f"{stem}{suffix}.index.json", directory / f"{stem}{suffix}"
        if index.exists() and not (file.exists() and _is_left_behind(index, file)):
            return _unwrapped(_read_shards(directory, index, f"{stem}-*{suffix}", read), directory)
        if file.exists():
            return _unwrapped(read(file), directory)
    alone = " (mm_projector.bin is a projector alone: --base DIR)" if (directory / "mm_projector.bin").exists() else ""
    expected = "expected model.safetensors or pytorch_model.bin, or an index of shards; found none"
    raise UserError(f"{directory}: {expected}{alone}")


def _is_left_behind(index: Path, file: Path) -> bool:
    """Whether an index beside a single file is of shards that are gone; UserError where both could be meant."""
    shards = set(read_index(index).values())
    if file.name in shards or not shards:
        return False
    with readable(index):  # a name may be too long
        there = any((file.parent / name).exists() for name in shards if not name_leads_out(name))
    if there:
        both = f"found {file.name} and {index.name}, and they may differ; move away the one that is not meant"
        raise UserError(f"{file.parent}: expected one checkpoint, {both}")
    return True


def unread_weights(directory: Path) -> list[str]:
    """Notes on files that look like the checkpoint too."""
    names = [[f"{stem}{suffix}", f"{stem}{suffix}.index.json"] for stem, suffix, _ in _WEIGHTS]
    there = [[name for name in group if (directory / name).exists()] for group in names]
    return [f"{directory}: {there[0][0]} is read, {there[1][0]} beside it is not"] if all(there) else []


def _unwrapped(tensors: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Without the prefix that PyTorch's wrappers for several devices or compilation put before all names."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, directory)
    wrapped = next((name for name in tensors if name.startswith("base_model.")), None)
    if wrapped:
        what = "PEFT's name of a tensor in a model with adapters"
        raise UserError(
            f"{directory}: {wrapped}: {what}; save it after merge_and_unload(), or give adapter and --base DIR"
        )
    return tensors


def _read_shards(directory: Path, index: Path, pattern: str, read: Callable) -> dict[str, Tensor]:
    weight_map = read_index(index)
    files = {name: inside(directory, name) for name in sorted(set(weight_map.values()))}
    for name, file in files.items():
        with readable(index):  # as above
            there = file.exists()
        if not there:
            raise UserError(f"{index}: the shard {name} is not there")
    strays = {file.name for file in directory.glob(pattern)} - files.keys()
    if strays:
        raise UserError(f"{index}: the shard {min(strays)} is missing from the index")
    tensors = {}
    for name, file in files.items():
        for tensor_name, tensor in read(file).items():
            if weight_map.get(tensor_name) != name:
                where = weight_map.get(tensor_name, "nowhere")
                raise UserError(f"{index}: {tensor_name}: expected in {where}, found in {name}")
            tensors[tensor_name] = tensor
    lost = weight_map.keys() - tensors.keys()
    if lost:
        raise UserError(f"{index}: {min(lost)}: expected in {weight_map[min(lost)]}, which does not hold it")
    return tensors


def open_source(
    path: Path, vision_tower: Path | None = None, base: Path | None = None, ignored: Collection[str] = ()
) -> Source:
    """A LLaVA or VoCo-LLaMA directory, released or Hugging Face's; or one that holds a language model alone.

    `vision_tower`: a CLIP directory, for released checkpoints that only name theirs. `base`: the checkpoint that a LoRA
    adapter, or a projector trained alone, belongs to. `ignored`: unknown keys of configs that are to be passed over.
    """
    if not path.exists():
        hint = "; if this is a name on Hugging Face's hub, download it first: "
        name = re.fullmatch(r"[\w.-]+/([\w.-]+)", str(path))
        raise UserError(f"{path}: not found" + (f"{hint}hf download {path} --local-dir {name[1]}" if name else ""))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: expected a directory or a .gguf file")
        return open_parts(path, vision_tower, ignored=ignored)
    if base is not None or is_adapter(path):
        return _open_adapter(path, vision_tower, base, ignored)
    file = path / "config.json"
    fields = read_object(file)
    kind = fields.get("model_type")
    if _is_llava(fields):
        return _open_llava(path, fields, vision_tower, ignored)
    if kind == "llava":
        return _open_llava_hf(path, fields, vision_tower, ignored)
    if kind in LANGUAGE_MODELS:
        return open_parts(path, vision_tower, ignored=ignored)
    known = ", ".join(map(repr, ("llava_llama", "llava", *LANGUAGE_MODELS)))
    raise UserError(f"{file}: model_type: expected one of {known}; found {shortened(kind)}")


def _is_llava(fields: dict) -> bool:
    """Whether a config is a released LLaVA's; the first releases call themselves 'llava', as Hugging Face's do."""
    return fields.get("model_type") == "llava_llama" or "mm_vision_tower" in fields


def _open_adapter(path: Path, vision_tower: Path | None, base: Path | None, ignored: Collection[str]) -> Source:
    """What LLaVA's training with LoRA leaves (adapter, config.json, `non_lora_trainables.bin`), or any adapter of PEFT.

    The base is read as any checkpoint; where the adapter's directory has LLaVA's config, that is the model's.
    """
    if base is None:
        named = base_of(path)
        named = f" (the adapter names {shortened(named)}, which is never fetched)" if named else ""
        raise UserError(f"{path}: a LoRA adapter: give the checkpoint it was trained on with --base DIR{named}")
    fields = read_object(path / "config.json") if (path / "config.json").exists() else {}
    fields.pop("quantization_config", None)  # QLoRA's base was quantized while it trained; the one given is not
    extra = trained_beside(path)
    if _is_llava(fields):
        source = _open_llava(path, fields, vision_tower, ignored, base, extra)
        source.notes += unread_weights(base)
    else:
        source = open_source(base, vision_tower, ignored=ignored)
        replace(source.tensors, source.names, extra, path)
    if is_adapter(path):
        apply_adapter(source.tensors, source.names, path, ignored)
    if (EMBEDDING, None) in source.tensors:  # which may have been trained whole, with tokens added
        rows = source.tensors[EMBEDDING, None].shape[0]
        source.llama = dataclasses.replace(source.llama, vocab_size=rows)
    source.path, source.tokenizer = path, _tokenizer(path) or source.tokenizer or _tokenizer(base)
    return source


def _open_llava(
    path: Path, fields: dict, vision_tower: Path | None, ignored: Collection[str],
    base: Path | None = None, extra: Mapping[str, Tensor] | None = None,
) -> Source:  # fmt: skip
    """With `base`, weights come from there; `extra` replace them."""
    file = path / "config.json"
    llama = language_family(fields).from_hf(fields, file, llava.KEYS, ignored=ignored)
    projector_layers = llava.projector_layers(fields, file)
    layer, feature = llava.features(fields, file)
    if base is not None:
        check_same_model(llama, file, base / "config.json")
    tensors = read_directory(base or path) | dict(extra or {})
    own = any(name.startswith(FORMATS[0].vision) for name in tensors)
    name = fields.get("mm_vision_tower") or ""
    if not isinstance(name, str):
        raise UserError(f"{file}: mm_vision_tower: expected a name, found {shortened(name)}")
    beside = vision_tower
    if not beside and name and not name_leads_out(name):
        with readable(file):  # a name may be too long
            beside = path / name if (path / name / "config.json").exists() else None
    if beside:
        vision = _read_vision(beside, layer, feature, ignored)
    else:
        vision = clip.from_name(name, file, layer, feature)
    source = Source("voco", path, llama, vision, _tokenizer(path), whole=True, projector_layers=projector_layers)
    source.notes += unread_weights(path)
    source.processor = processors.processor_of_llava(fields, file, beside, vision, ignored)
    format = LLAVA_LINEAR if LLAVA_LINEAR.projector + "weight" in tensors else FORMATS[0]
    source.take(tensors, format, ("llm", "head", "projector") + (("vision",) if own else ()))
    if not own:
        if not beside:
            found = f"has no vision tower inside, and names {shortened(name)}"
            raise UserError(f"{path}: {found}: give it with --vision-tower DIR")
        _take_vision(source, beside)
    return source


def _open_llava_hf(path: Path, fields: dict, vision_tower: Path | None, ignored: Collection[str]) -> Source:
    file = path / "config.json"
    if vision_tower:
        raise UserError(f"{path}: has its vision tower inside; --vision-tower is for checkpoints without")
    llava.HF_KEYS.check(fields, file, ignored=ignored)
    layer, feature = llava.hf_features(fields, file)
    text = section(fields, "text_config", file)
    # transformers 5 writes what it was told at the top, and a default below
    tied = bool(fields.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    vision = llava.hf_vision(fields, file, layer, feature, ignored)
    text = text | {"tie_word_embeddings": tied}
    llama = language_family(text).from_hf(text, file, prefix="text_config.", ignored=ignored)
    source = Source("llava-hf", path, llama, vision, _tokenizer(path), whole=True)
    source.processor = processors.processor_of_llava_hf(path, vision, ignored)
    source.notes += unread_weights(path)
    tensors = read_directory(path)
    parts = ("llm", "projector", "vision")
    format = recognise(tensors, FORMATS[1:], parts)
    if format is None:
        raise UserError(
            f"{path}: expected tensors of LlavaForConditionalGeneration, found {min(tensors, default='none')}"
        )
    source.take(tensors, format, (*parts, "head"))
    return source


def open_parts(
    llm: Path, vision_tower: Path | None = None, projector: Path | None = None, ignored: Collection[str] = ()
) -> Source:
    """A language model, a CLIP vision tower and a projector, each from where it lies; the last two may be missing."""
    if llm.suffix == ".gguf":
        llama, tensors = read_gguf(llm, ignored)
        source = Source("gguf", llm, llama, tokenizer=llm)
        source.take(tensors, LLAMA, ("llm", "head"))
    else:
        file = llm / "config.json"
        fields = read_object(file)
        family = language_family(fields)
        llama = family.from_hf(fields, file, family.KEYS | llava.OWN_KEYS, ignored=ignored)  # a LLaVA's holds one too
        source = Source("llama", llm, llama, None, _tokenizer(llm), notes=unread_weights(llm))
        source.take(read_directory(llm), LLAMA, ("llm", "head"))
    if vision_tower:
        source.vision = _read_vision(vision_tower, -2, "patch", ignored)
        source.processor = processors.processor_of_tower([vision_tower], source.vision, ignored=ignored)
        _take_vision(source, vision_tower)
    if projector:
        tensors = read_safetensors(projector) if projector.suffix == ".safetensors" else read_torch(projector)
        format = recognise(tensors, PROJECTOR, ("projector",))
        if format is None:
            raise UserError(f"{projector}: expected mm_projector.0.weight …, found {min(tensors, default='none')}")
        source.projector_layers = num_projector_layers(format)
        source.take(tensors, format, ("projector",))
    return source


def _read_vision(directory: Path, layer: int, feature: str, ignored: Collection[str]) -> ViTConfig:
    """The dimensions of a vision tower alone, and what of it LLaVA takes."""
    file = directory / "config.json"
    fields = read_object(file)
    return vision_family(fields).from_hf(fields, file, layer, feature, ignored)


def _take_vision(source: Source, directory: Path) -> None:
    tensors = read_directory(directory)
    format = recognise(tensors, VISION, ("vision",))
    if format is None:
        raise UserError(f"{directory}: expected a CLIP vision tower, found {min(tensors, default='none')}")
    source.take(tensors, format, ("vision",))


def _tokenizer(directory: Path) -> Path | None:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return directory if any((directory / name).exists() for name in names) else None
