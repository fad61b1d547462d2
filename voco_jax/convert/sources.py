"""Opens a checkpoint: its format, its dimensions, and its tensors under our names."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from pathlib import Path
import re
from typing import Any

from voco_jax.convert import formats, processors
from voco_jax.convert.adapters import Key, apply_adapter, base_of, check_same_model, is_adapter, replace, trained_beside
from voco_jax.convert.config_keys import given, section
from voco_jax.convert.families import LANGUAGE_MODELS, RULES, language_family, llava
from voco_jax.convert.families.vision import family_of_tower, from_name, vision_family
from voco_jax.convert.formats import Format, recognise
from voco_jax.convert.gguf_files import read_gguf
from voco_jax.convert.tensors import inside, name_leads_out, same_bytes
from voco_jax.convert.tiles import Tiles, tiles_of
from voco_jax.convert.torch_files import read_torch
from voco_jax.convert.vocabulary import EMBEDDING, HEAD
from voco_jax.data.images import ImageProcessor
from voco_jax.errors import UserError
from voco_jax.io.files import readable
from voco_jax.io.json_files import read_object
from voco_jax.io.safetensors import read_index, read_safetensors
from voco_jax.io.tensors import DTYPES, Tensor
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened


@dataclasses.dataclass
class Source:
    """A checkpoint. Parts that it lacks have no config and no tensors."""

    format: str
    path: Path
    llama: LlamaConfig
    vision: ViTConfig | None = None
    tokenizer: Path | None = None
    tensors: dict[Key, Tensor] = dataclasses.field(default_factory=dict)
    names: dict[Key, str] = dataclasses.field(default_factory=dict)  # as the checkpoint has them
    problems: list[str] = dataclasses.field(default_factory=list)  # tensors that are unknown or appear twice
    processor: ImageProcessor | None = None  # None: the default
    tiles: Tiles | None = None  # what a LLaVA-NeXT or LLaVA-OneVision has for them
    whole: bool = False  # the format has all parts; in others vision tower and projector may be missing
    projector_layers: int = 2
    projector_bias: bool = True
    notes: list[str] = dataclasses.field(default_factory=list)  # files that were not read

    def parts(self) -> set[str]:
        return {path.split(".")[0] for path, _ in self.tensors}

    def missing_parts(self) -> list[str]:
        expected = ("llama", "projector", "vision_tower") if self.whole else ("llama",)
        return [part for part in expected if part not in self.parts()]

    def take(self, tensors: Mapping[str, Tensor], format: Format, parts: tuple[str, ...]) -> None:
        """Add tensors under our names. Unknown ones, and those that are there already, become problems."""
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
                    continue  # `check_source` reports what is missing
                key = rule.ours, layer
                if key in self.tensors:
                    self.problems.append(f"{name} doubled ({self.tensors[key].file.name}, {left[name].file.name})")
                self.tensors[key], self.names[key] = left.pop(name), name
        if "head" in parts and self.llama.tie_word_embeddings:
            self._drop_tied_head()
        tower = family_of_tower(self.vision) if self.vision and "vision" in parts else None
        self.problems += [
            f"{name} unknown ({left[name].file.name})" for name in left if not formats.passed_over(name, format, tower)
        ]

    def _drop_tied_head(self) -> None:
        """Some programs store the head of tied embeddings too; it must have the same values."""
        head, embedding = (self.tensors.get((path, None)) for path in (HEAD, EMBEDDING))
        if head is None or embedding is None:
            return
        del self.tensors[HEAD, None]
        name = self.names.pop((HEAD, None))
        if head.shape != embedding.shape or not same_bytes(head.read(), embedding.read()):
            self.problems.append(f"{name} differs from the embedding, but tie_word_embeddings is set")


_WEIGHTS = (("model", ".safetensors", read_safetensors), ("pytorch_model", ".bin", read_torch))


def read_directory(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory: safetensors or PyTorch files, one or several with an index.

    Where both kinds are there, safetensors are read, as by transformers. UserError where a single file and an index are
    there and either could be meant.
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
    """Whether the shards of an index beside a single file are gone; UserError where both could be meant."""
    shards = set(read_index(index).values())
    if file.name in shards or not shards:
        return False
    if any(_exists(file.parent / name, index) for name in shards if not name_leads_out(name)):
        both = f"found {file.name} and {index.name}, and they may differ; move away the one that is not meant"
        raise UserError(f"{file.parent}: expected one checkpoint, {both}")
    return True


def _exists(path: Path, named_in: Path) -> bool:
    with readable(named_in):  # the name may be too long for the file system
        return path.exists()


def unread_weights(directory: Path) -> list[str]:
    """A note on PyTorch files beside safetensors, which are not read."""
    names = [[f"{stem}{suffix}", f"{stem}{suffix}.index.json"] for stem, suffix, _ in _WEIGHTS]
    there = [[name for name in group if (directory / name).exists()] for group in names]
    return [f"{directory}: {there[0][0]} is read, {there[1][0]} beside it is not"] if all(there) else []


def _unwrapped(tensors: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Without the prefixes of PyTorch's DataParallel ('module.') and compile ('_orig_mod.')."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, directory)
    wrapped = next((name for name in tensors if name.startswith("base_model.")), None)
    if wrapped:
        raise UserError(
            f"{directory}: {wrapped}: PEFT's name of a tensor; save the model after merge_and_unload(), or give the "
            "adapter and --base DIR"
        )
    return tensors


def _read_shards(directory: Path, index: Path, pattern: str, read: Callable) -> dict[str, Tensor]:
    weight_map = read_index(index)
    files = {name: inside(directory, name) for name in sorted(set(weight_map.values()))}
    for name, file in files.items():
        if not _exists(file, index):
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
    """A LLaVA or VoCo-LLaMA directory, released or Hugging Face's; a language model; or an adapter with its base.

    `vision_tower`: a CLIP or SigLIP directory, for released checkpoints that only name theirs. `base`: the checkpoint
    that a LoRA adapter, or a projector trained alone, belongs to. `ignored`: unknown config keys to accept.
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
    if kind in llava.HF_DEFAULTS:
        return _open_llava_hf(path, fields, vision_tower, ignored)
    if kind in LANGUAGE_MODELS:
        return open_parts(path, vision_tower, ignored=ignored)
    known = ", ".join(map(repr, ("llava_llama", *llava.HF_DEFAULTS, *LANGUAGE_MODELS)))
    raise UserError(f"{file}: model_type: expected one of {known}; found {shortened(kind)}")


def _is_llava(fields: dict) -> bool:
    """Whether a config is a released LLaVA's. The first ones have model_type 'llava', as Hugging Face's have now."""
    return fields.get("model_type") == "llava_llama" or "mm_vision_tower" in fields


def _open_adapter(path: Path, vision_tower: Path | None, base: Path | None, ignored: Collection[str]) -> Source:
    """An adapter of PEFT, or what LLaVA's training with LoRA writes: adapter, config.json, `non_lora_trainables.bin`.

    The base is read like any checkpoint. Where the adapter's directory has a LLaVA config, that one counts.
    """
    if base is None:
        named = base_of(path)
        named = f" (the adapter names {shortened(named)}, which is never fetched)" if named else ""
        raise UserError(f"{path}: a LoRA adapter: give the checkpoint it was trained on with --base DIR{named}")
    fields = read_object(path / "config.json") if (path / "config.json").exists() else {}
    fields.pop("quantization_config", None)  # QLoRA quantizes its base in training; the base given here is not
    extra = trained_beside(path)
    if _is_llava(fields):
        source = _open_llava(path, fields, vision_tower, ignored, base, extra)
        source.notes += unread_weights(base)
    else:
        source = open_source(base, vision_tower, ignored=ignored)
        replace(source.tensors, source.names, extra, path)
    if is_adapter(path):
        apply_adapter(source.tensors, source.names, path, ignored, tied=source.llama.tie_word_embeddings)
    if (EMBEDDING, None) in source.tensors:  # the adapter may have replaced it by one with more rows
        rows = source.tensors[EMBEDDING, None].shape[0]
        source.llama = dataclasses.replace(source.llama, vocab_size=rows)
    source.path, source.tokenizer = path, _tokenizer(path) or source.tokenizer or _tokenizer(base)
    return source


def _open_llava(
    path: Path, fields: dict, vision_tower: Path | None, ignored: Collection[str],
    base: Path | None = None, extra: Mapping[str, Tensor] | None = None,
) -> Source:  # fmt: skip
    """With `base`, the weights are the base's; `extra` replaces some of them."""
    file = path / "config.json"
    llama = LANGUAGE_MODELS["llama"].from_hf(fields, file, llava.KEYS, ignored=ignored)
    projector_layers = llava.projector_layers(fields, file)
    selected = llava.features(fields, file)
    if base is not None:
        check_same_model(llama, file, base / "config.json")
    tensors = read_directory(base or path) | dict(extra or {})
    own = any(name.startswith(formats.FORMATS[0].vision) for name in tensors)
    name = fields.get("mm_vision_tower") or ""
    if not isinstance(name, str):
        raise UserError(f"{file}: mm_vision_tower: expected a name, found {shortened(name)}")
    beside = vision_tower
    if not beside and name and not name_leads_out(name) and _exists(path / name / "config.json", file):
        beside = path / name
    if beside:
        vision = _read_vision(beside, ignored, **selected)
    else:
        vision = from_name(name, file, **selected)
    source = Source("voco", path, llama, vision, _tokenizer(path), whole=True, projector_layers=projector_layers)
    source.notes += unread_weights(path)
    source.processor = processors.processor_of_llava(fields, file, beside, vision, ignored)
    format = formats.LLAVA_LINEAR if formats.LLAVA_LINEAR.projector + "weight" in tensors else formats.FORMATS[0]
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
    kind = fields["model_type"]
    keys = llava.HF_KEYS if kind == "llava" else llava.TILED_KEYS
    keys.check(fields, file, ignored=ignored)
    fields = llava.HF_DEFAULTS[kind] | given(fields)
    text = section(fields, "text_config", file)
    # transformers 5 writes the value at the top, and a default into text_config
    tied = bool(fields.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    vision = llava.hf_vision(fields, file, ignored)
    text = text | {"tie_word_embeddings": tied}
    llama = language_family(text, file, "text_config.").from_hf(text, file, prefix="text_config.", ignored=ignored)
    bias = fields.get("multimodal_projector_bias") in (True, None)
    source = Source("llava-hf", path, llama, vision, _tokenizer(path), whole=True, projector_bias=bias)
    source.processor = processors.processor_of_llava_hf(path, vision, ignored)
    source.notes += unread_weights(path)
    tensors = read_directory(path)
    if kind != "llava" and (newline := next((name for name in llava.IMAGE_NEWLINE if name in tensors), None)):
        _keep_tiles(source, fields, newline, tensors.pop(newline))
    parts = ("llm", "projector", "vision")
    format = recognise(tensors, formats.FORMATS[1:], parts, path, "tensors of LlavaForConditionalGeneration")
    source.take(tensors, format, (*parts, "head"))
    return source


def _keep_tiles(source: Source, fields: dict, name: str, newline: Tensor) -> None:
    size = source.llama.hidden_size
    if newline.shape != (size,) or newline.dtype not in DTYPES.values():
        found = f"{newline.dtype} {list(newline.shape)}"
        source.problems.append(f"{name}: expected {', '.join(DTYPES)} of shape [{size}]; found {found}")
        return
    source.tiles = tiles_of(source.path, fields, newline.read())
    source.notes.append(
        f"{source.path}: pictures are looked at as a whole, without tiles; {name} is kept for to-hf --format "
        f"{source.tiles.format}"
    )


def open_parts(
    llm: Path, vision_tower: Path | None = None, projector: Path | None = None, ignored: Collection[str] = ()
) -> Source:
    """A language model, and perhaps a vision tower and a projector, each from a place of its own."""
    if llm.suffix == ".gguf":
        llama, tensors = read_gguf(llm, ignored)
        source = Source("gguf", llm, llama, tokenizer=llm)
        source.take(tensors, formats.LLAMA, ("llm", "head"))
    else:
        file = llm / "config.json"
        fields = read_object(file)
        family = language_family(fields, file)
        llama = family.from_hf(fields, file, family.KEYS | llava.OWN_KEYS, ignored=ignored)
        source = Source("llama", llm, llama, None, _tokenizer(llm), notes=unread_weights(llm))
        source.take(read_directory(llm), formats.LLAMA, ("llm", "head"))
    if vision_tower:
        source.vision = _read_vision(vision_tower, ignored)
        source.processor = processors.processor_of_tower([vision_tower], source.vision, ignored=ignored)
        _take_vision(source, vision_tower)
    if projector:
        tensors = read_safetensors(projector) if projector.suffix == ".safetensors" else read_torch(projector)
        format = recognise(tensors, formats.PROJECTOR, ("projector",), projector, "mm_projector.0.weight …")
        source.take(tensors, format, ("projector",))
        names = [path for path, _ in source.tensors if path.startswith("projector.")]
        source.projector_layers = sum(path.endswith(".kernel") for path in names)
        source.projector_bias = any(path.endswith(".bias") for path in names)
    return source


def _read_vision(directory: Path, ignored: Collection[str], **selected: Any) -> ViTConfig:
    """The config of a vision tower; `selected`: ViTConfig's choices of features, by default LLaVA's."""
    file = directory / "config.json"
    fields = read_object(file)
    return vision_family(fields, file).from_hf(fields, file, ignored, **selected)


def _take_vision(source: Source, directory: Path) -> None:
    tensors = read_directory(directory)
    format = recognise(tensors, formats.VISION, ("vision",), directory, "a CLIP or SigLIP vision tower")
    source.take(tensors, format, ("vision",))


def _tokenizer(directory: Path) -> Path | None:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return directory if any((directory / name).exists() for name in names) else None
