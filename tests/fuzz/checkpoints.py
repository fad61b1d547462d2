"""Directories of checkpoints, whose configs and indexes are edited: formats of LLaVA, and an adapter with its base.

And directories of tokenizers. None of these files has a checksum: what they say is what is read. Each case must be a
checkpoint, or one line.
"""

import json
import os
from pathlib import Path
import shutil
import tempfile

import numpy as np

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage, dumps, odd_json, odd_value
from tests.fuzz.weights import remove, special
from tests.helpers import reference
from voco_jax.convert.families import BY_OURS
from voco_jax.convert.formats import FORMATS, key_of_name
from voco_jax.convert.inspect import problems_of
from voco_jax.convert.sources import open_source
from voco_jax.convert.to_jax import Options, run_config

# Keys that configs may have, and the sound ones here have not
_MORE = {
    "config.json": "rope_scaling rope_parameters rope_theta original_max_position_embeddings max_sequence_length "
    "head_dim initializer_range mm_vision_select_feature image_aspect_ratio quantization_config tie_word_embeddings "
    "text_config vision_config vision_feature_layer vision_feature_select_strategy image_processor hidden_act "
    "multimodal_projector_bias vision_use_head num_patches mm_projector_type",
    "preprocessor_config.json": "image_processor_type feature_extractor_type size crop_size pad_size resample do_pad "
    "rescale_factor image_mean image_std do_resize do_center_crop default_to_square",
    "adapter_config.json": "rank_pattern alpha_pattern use_rslora use_dora bias lora_bias base_model_name_or_path",
    "processor_config.json": "image_processor patch_size vision_feature_select_strategy image_token",
}
_ROPES = (
    {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4}, {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "mscale": 1, "mscale_all_dim": 0.5, "beta_fast": 32, "original_max_position_embeddings": 64},
)  # fmt: skip


def make_checkpoints(directory: Path) -> dict[str, Path]:
    """A released LLaVA, Hugging Face's, one in two shards, and an adapter of it; small, by what they are."""
    from safetensors.numpy import load_file, save_file

    released = reference.DIRECTORY
    config = json.loads((released / "config.json").read_text())
    tower = json.loads((released / "vision_tower" / "config.json").read_text())
    tensors = load_file(released / "model.safetensors")
    every = tensors | {
        f"model.vision_tower.vision_tower.{name}" if not name.startswith("model.") else name: tensor
        for name, tensor in load_file(released / "vision_tower" / "model.safetensors").items()
    }
    places = {name: directory / name for name in ("released", "hf", "shards", "adapter")}
    for place in places.values():
        place.mkdir()
    (places["released"] / "model.safetensors").symlink_to(released / "model.safetensors")
    (places["released"] / "config.json").write_text(json.dumps(config))
    shutil.copytree(released / "vision_tower", places["released"] / "vision_tower")
    (places["released"] / "vision_tower" / "preprocessor_config.json").write_text('{"size": 42, "crop_size": 42}')

    keys = {key_of_name(name): tensor for name, tensor in every.items() if key_of_name(name)}
    renamed = {FORMATS[1].their_name(BY_OURS[ours], layer): tensor for (ours, layer), tensor in keys.items()}
    save_file(renamed, places["hf"] / "model.safetensors")
    text = {key: value for key, value in config.items() if not key.startswith(("mm_", "image", "use_mm", "tune"))}
    hf = {"model_type": "llava", "text_config": text | {"model_type": "llama"}, "vision_config": tower}
    hf |= {"image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    (places["hf"] / "config.json").write_text(json.dumps(hf | {"projector_hidden_act": "gelu"}))
    (places["hf"] / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 42}, "crop_size": 42}')
    (places["hf"] / "processor_config.json").write_text('{"patch_size": 14, "image_token": "<image>"}')

    names, weight_map = sorted(tensors), {}
    for i in (0, 1):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, places["shards"] / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    (places["shards"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (places["shards"] / "config.json").write_text(json.dumps(config))
    (places["shards"] / "vision_tower").symlink_to(released / "vision_tower")

    module = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    matrices = {
        module.format(i, kind): np.ones((4, 32) if kind == "A" else (32, 4), "f") for i in (0, 1) for kind in "AB"
    }
    save_file(matrices, places["adapter"] / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {"q_proj": 4}}
    (places["adapter"] / "adapter_config.json").write_text(json.dumps(adapter | {"bias": "none"}))
    (places["adapter"] / "config.json").write_text(json.dumps(config))
    (places["adapter"] / "vision_tower").symlink_to(released / "vision_tower")
    return places


class Checkpoints(Target):
    count = 1000

    def make(self, directory: Path) -> None:
        self.sound = make_checkpoints(Path(tempfile.mkdtemp(dir=directory)))
        self.pairs = [
            (name, file.relative_to(place))
            for name, place in self.sound.items()
            for file in sorted(place.rglob("*.json"))
            if not file.parent.is_symlink()
        ]
        for name, place in self.sound.items():
            assert self._read(name, place, True) is None

    def case(self, rng, directory):
        name, inner = self.pairs[rng.integers(len(self.pairs))]
        place, file = directory / "case", directory / "case" / inner
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.sound[name], place, symlinks=True)
        sound = json.loads(file.read_text())
        kind = str(rng.choice(["edited", "more", "damaged", "special"], p=[0.6, 0.25, 0.1, 0.05]))
        if kind == "edited":
            what, value = odd_json(rng, sound)
            file.write_bytes(dumps(value))
        elif kind == "more":
            keys = _MORE.get(file.name, _MORE["config.json"]).split()
            key = keys[rng.integers(len(keys))]
            value = _ROPES[rng.integers(len(_ROPES))] if key.startswith("rope_") else odd_value(rng)
            what, value = odd_json(rng, {key: value}) if rng.random() < 0.5 else (key, {key: value})
            what = f"{what}: {str(value)[:60]}"
            file.write_bytes(dumps(sound | value if isinstance(value, dict) else value))
        elif kind == "damaged":
            what, data = damage(rng, file.read_bytes())
            file.write_bytes(data)
        else:
            files = [path for path in sorted(place.rglob("*")) if path.is_file()]
            file = files[rng.integers(len(files))]
            remove(file)
            what = f"{special(rng, file)} for {file.name}"
        return f"{name}, {inner}: {kind}: {what}", lambda: self._read(name, place, rng.random() < 0.2)

    def _read(self, name: str, place: Path, whole: bool) -> str | None:
        """All that `to-jax` does before it reads weights; whether they fit is slow to tell, so not each time."""
        base = self.sound["released"] if name == "adapter" else None
        source = open_source(place, base=base)
        run_config(source, 32001, Options(), place)
        if whole:
            problems_of(source)


class Tokenizers(Target):
    count = 1000

    def make(self, directory: Path) -> None:
        from tests.helpers import tokenizer_kinds

        directory = Path(tempfile.mkdtemp(dir=directory))
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        llama = names | {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
        added = {"2": {"content": "</s>", "special": True}, "400": {"content": "<x>", "lstrip": False}}
        files = {
            "json": {
                "tokenizer_json": json.loads(tokenizer_kinds.byte_level().to_str()),
                "tokenizer_config_json": names
                | {"chat_template": "{{ messages }}", "additional_special_tokens": ["<y>"]},
                "special_tokens_map_json": names,
                "generation_config_json": {"eos_token_id": [1]},
                "added_tokens_json": {},
            },
            "pieces": {
                "tokenizer_model": tokenizer_kinds.sentencepiece_model(),
                "tokenizer_config_json": llama | {"legacy": False, "added_tokens_decoder": added},
            },
            "unigram": {
                "tokenizer_model": tokenizer_kinds.sentencepiece_model("unigram"),
                "tokenizer_config_json": llama,
            },
        }
        self.sound = {name: tokenizer_kinds.directory(directory / name, **content) for name, content in files.items()}
        state = json.loads(tokenizer_kinds.byte_level().to_str())["model"]
        self.sound["gpt"] = tokenizer_kinds.directory(
            directory / "gpt",
            vocab_json=state["vocab"],
            tokenizer_config_json={"tokenizer_class": "GPT2Tokenizer", **names},
        )
        merges = "\n".join(" ".join(pair) for pair in state["merges"])
        (self.sound["gpt"] / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        self.pairs = [(name, file.name) for name, place in self.sound.items() for file in sorted(place.iterdir())]

    def case(self, rng, directory):
        name, inner = self.pairs[rng.integers(len(self.pairs))]
        place, file = directory / "case", directory / "case" / inner
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.sound[name], place)
        kind = str(rng.choice(["edited", "damaged", "bomb", "special"], p=[0.6, 0.3, 0.03, 0.07]))
        if kind == "edited" and file.suffix == ".json":
            what, value = odd_json(rng, json.loads(file.read_text()))
            if rng.random() < 0.3 and isinstance(value, dict) and file.name == "tokenizer.json":
                what, value = self._hostile(rng, value)
            file.write_bytes(dumps(value))
        elif kind == "bomb":
            what, unit = "bomb", [b"{},", b"[],", b'"x",', b'["a","b"],', b"1,"][rng.integers(5)]
            end = b"0]}" if file.suffix == ".json" else b""
            file.write_bytes(b'{"x": [' + unit * (int(rng.choice([2**23, 2**25])) // len(unit)) + end)
        elif kind == "special":
            remove(file)
            what = special(rng, file)
        else:
            kind, (what, data) = "damaged", damage(rng, file.read_bytes())
            file.write_bytes(data)
        return f"{name}, {inner}: {kind}: {what}", lambda: self._read(place)

    def _hostile(self, rng, state: dict) -> tuple[str, dict]:
        """A `tokenizer.json` that is well formed, and wants much."""
        slow = {"type": "Split", "pattern": {"Regex": "(a+)+$|(.*.*.*.*)*x"}, "behavior": "Isolated", "invert": False}
        grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
        changes = {
            "pre_tokenizer": [slow, {"type": "Sequence", "pretokenizers": [slow] * 100}],
            "normalizer": [{"type": "Sequence", "normalizers": [grow] * int(rng.choice([1, 2, 3, 5]))}, None],
            "truncation": [{"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}],
            "padding": [{"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "</s>"}],
            "decoder": [None, {"type": "Fuse"}],
            "post_processor": [{"type": "BertProcessing", "sep": ["x", 10**9], "cls": ["y", 5]}],
            "added_tokens": [[{"id": int(i), "content": "<z>", "single_word": False, "lstrip": False, "rstrip": False,
                               "normalized": False, "special": True}] for i in (0, 5, 10**6, 2**31, 2**32 - 1)],
        }  # fmt: skip
        key = str(rng.choice(list(changes)))
        change = changes[key][rng.integers(len(changes[key]))]
        return f"{key} {str(change)[:60]}", state | {key: change}

    def _read(self, place: Path) -> str | None:
        from voco_jax.data.tokenizer import load_tokenizer, prompt_ids

        os.environ["HF_HUB_OFFLINE"] = "1"
        prompt_ids(load_tokenizer(place))
