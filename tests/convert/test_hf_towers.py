"""Vision towers, selected layers and projectors against transformers' own, in float32: small random models."""

import dataclasses
import functools
import json
from pathlib import Path
import re
import zlib

import jax
import ml_dtypes
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from tests.convert.test_convert import convert  # noqa: F401 (a fixture)
from tests.convert.test_convert_parity import (
    IMAGE,
    TEXT,
    our_logits,
    randomized,
    their_logits,
    tokenizer,  # noqa: F401 (a fixture)
)
from tests.helpers import tiny
from voco_jax.checkpoint.init_from import TILES
from voco_jax.checkpoint.run import load_run
from voco_jax.config import default_config, load_config, save_config
from voco_jax.convert.families.clip import from_hf as clip_from_hf
from voco_jax.convert.families.llava import hf_vision
from voco_jax.convert.families.vision import HUB_TOWERS, from_name
from voco_jax.convert.sources import open_source
from voco_jax.convert.tiles import Tiles, read_tiles, write_tiles
from voco_jax.convert.to_hf import check_run, to_hf
from voco_jax.convert.to_jax import Options, to_jax
from voco_jax.data.tokenizer import save_tokenizer, train_tokenizer
from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig
from voco_jax.train.loop import train

pytestmark = pytest.mark.peer

SIDE, PATCH, GRID = 31, 9, 3  # a rest of four pixels, which no patch has
TOWER = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=SIDE, patch_size=PATCH
)
PROCESSORS = {
    "clip_vision_model": {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": SIDE
    },
    "siglip_vision_model": {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}, "resample": 2
    },
}  # fmt: skip
FILE = Path("config.json")


def siglip(**changes) -> transformers.SiglipVisionConfig:
    return transformers.SiglipVisionConfig(**TOWER | {"layer_norm_eps": 1e-3} | changes)


def clip(**changes) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**TOWER | {"layer_norm_eps": 1e-3} | changes)


# Vision tower, strategy, layers, biases of the projector, language model. Hidden states are 0 (the embeddings) to 3.
# The language models with CLIP's tower as LLaVA-1.5 has it: test_convert_parity.py
CASES = {
    "SigLIP, every layer": (siglip(), "full", [-1, 0, -3, 2], False, "llama"),
    "SigLIP and Qwen2, as LLaVA-Interleave": (siglip(vision_use_head=False), "full", -1, True, "qwen2"),
    "SigLIP and Qwen3": (siglip(), "full", -2, True, "qwen3"),
    "SigLIP and Mistral": (siglip(), "full", [-2, -1], True, "mistral"),
    "CLIP, every layer": (clip(hidden_act="gelu"), "default", [1, -2, -4, 3], True, "qwen2"),
    "CLIP with the class token": (clip(hidden_act="gelu_pytorch_tanh"), "full", -1, False, "qwen3"),
}


@pytest.mark.parametrize("case", CASES)
def test_llava(case, tmp_path, tokenizer, convert):  # noqa: F811
    """Features and logits; and back: the same bytes, but for the head that pools SigLIP's features."""
    tower, strategy, layers, bias, language = CASES[case]
    with_class, dropped = tower.model_type == "clip_vision_model", strategy == "default"
    count = GRID**2 + with_class - dropped
    config = transformers.LlavaConfig(
        text_config=transformers.AutoConfig.for_model(language, **TEXT), vision_config=tower, image_token_index=IMAGE,
        vision_feature_layer=layers, vision_feature_select_strategy=strategy, multimodal_projector_bias=bias,
    )  # fmt: skip
    model = randomized(transformers.LlavaForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[tower.model_type]))
    arguments = [tmp_path / "theirs", tmp_path / "run", "--tokenizer", tokenizer, "--compressor", "none"]
    status, _, err = convert("to-jax", *arguments)
    assert status == 0, err

    rng = np.random.default_rng(0)
    text, pixels = rng.integers(3, IMAGE, size=9), rng.normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    with torch.no_grad():
        states = model.model.vision_tower(torch.tensor(pixels), output_hidden_states=True).hidden_states
    chosen = [states[layer][0, int(dropped) :].numpy() for layer in np.atleast_1d(layers)]
    run = load_run(tmp_path / "run")
    ours = jax.jit(run.model.vision_tower)(pixels.transpose(0, 2, 3, 1))[0]
    np.testing.assert_allclose(np.asarray(ours), np.concatenate(chosen, axis=-1), atol=1e-4, rtol=0)
    assert all(np.abs(x).max() > 1 for x in chosen)
    ids = np.concatenate([[1], text[:4], np.full(count, IMAGE), text[4:]]).astype(np.int32)
    expected = their_logits(model, ids, pixels)
    np.testing.assert_allclose(our_logits(tmp_path / "run", ids, pixels), expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1

    assert convert("to-hf", tmp_path / "run", tmp_path / "back", "--format", "llava-hf")[0] == 0
    status, out, _ = convert("verify", tmp_path / "theirs", tmp_path / "back")
    assert status == 0, out
    again, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.config.vision_feature_layer == layers and again.config.vision_feature_select_strategy == strategy
    ids = np.where(ids == IMAGE, again.config.image_token_id, ids)
    np.testing.assert_allclose(their_logits(again.eval(), ids, pixels), expected, atol=1e-6, rtol=0)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    picture = Image.fromarray(rng.integers(0, 256, (23, 47, 3), np.uint8))
    made = processor(text="what is <image>?", images=picture, return_tensors="np")
    np.testing.assert_allclose(made["pixel_values"][0].transpose(1, 2, 0), run.processor(picture), atol=1e-6, rtol=0)
    assert (made["input_ids"] == again.config.image_token_id).sum() == run.model.config.vision.num_features == count


TILED = {  # format, class, vision tower, selected layer, language model, sizes and fields of the processor
    "llava_next": (
        "llava-next", "LlavaNext", clip(), dict(vision_feature_layer=-2), "mistral",
        dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        dict(patch_size=PATCH, num_additional_image_tokens=1, vision_feature_select_strategy="default"),
    ),
    "llava_onevision": (
        "llava-onevision", "LlavaOnevision", siglip(vision_use_head=False), {}, "qwen2",
        dict(size={"height": SIDE, "width": SIDE}),
        dict(num_image_tokens=GRID**2, vision_aspect_ratio="anyres_max_2", video_token="<video>"),
    ),
}  # fmt: skip
PINPOINTS = [[SIDE, 3 * SIDE], [2 * SIDE, 2 * SIDE]]


def save_tiled(kind: str, directory: Path):
    """A small random model in its directory, with a tokenizer and the processor's files, as the hub has them."""
    _, name, tower, selected, language, sizes, fields = TILED[kind]
    if kind == "llava_onevision":
        selected = {"vision_aspect_ratio": fields["vision_aspect_ratio"], "video_token_index": IMAGE - 1}
    config = transformers.AutoConfig.for_model(
        kind, text_config=transformers.AutoConfig.for_model(language, **TEXT), vision_config=tower,
        image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, **selected,
    )  # fmt: skip
    model = randomized(transformers.AutoModelForImageTextToText.from_config(config))
    model.save_pretrained(directory)
    getattr(transformers, f"{name}ImageProcessorPil")(image_grid_pinpoints=PINPOINTS, **sizes).save_pretrained(
        directory
    )
    outer = {"processor_class": f"{name}Processor", "image_token": "<image>"} | fields
    (directory / "processor_config.json").write_text(json.dumps(outer))
    if kind == "llava_onevision":
        video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "auto_map": {"AutoVideoProcessor": "theirs"}}
        (directory / "video_preprocessor_config.json").write_text(json.dumps(video))
    words = train_tokenizer(["USER: what is it? ASSISTANT: a red cat\n"] * 9, vocab_size=400)
    spare = [f"<{i}>" for i in range(len(words), IMAGE - 1)]
    words.add_tokens([*spare, "<video>", "<image>"], special_tokens=True)
    save_tokenizer(words, directory)
    return model


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """A function of a `model_type`: (model, its directory, a run that was made of it, the lines about that)."""

    @functools.cache
    def make(kind: str):
        directory = tmp_path_factory.mktemp(kind)
        model = save_tiled(kind, directory / "theirs")
        source = open_source(directory / "theirs")
        lines = to_jax(source, directory / "run", None, Options(compressor="none"))
        return model, directory / "theirs", directory / "run", lines

    return make


def picture_of(rng) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (23, 47, 3), np.uint8))


def image_processor_of(directory: Path, kind: str):
    return getattr(transformers, f"{TILED[kind][1]}ImageProcessorPil").from_pretrained(directory)


@pytest.mark.parametrize("kind", TILED)
def test_models_of_tiles(kind, tiled, tmp_path, convert):  # noqa: F811
    """Language model, tower and projector of LLaVA-NeXT and LLaVA-OneVision, and their view of the whole picture."""
    model, theirs, directory, lines = tiled(kind)
    format_name, _, tower, _, language, _, _ = TILED[kind]
    kept = f"image_newline is kept for to-hf --format {format_name}"
    assert lines == [f"{theirs}: pictures are looked at as a whole, without tiles; {kept}"]

    rng = np.random.default_rng(0)
    picture, run = picture_of(rng), load_run(directory)
    pixels = np.asarray(image_processor_of(theirs, kind)(picture, return_tensors="np")["pixel_values"][0])[:1]
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), run.processor(picture), atol=1.01 / 255 / 0.26, rtol=0)
    # A LLaVA of the same parts is what looks at whole pictures alone
    same = transformers.LlavaConfig(
        text_config=transformers.AutoConfig.for_model(language, **TEXT), vision_config=tower, image_token_index=IMAGE,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    )  # fmt: skip
    llava = transformers.LlavaForConditionalGeneration(same).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "image_newline" not in name}
    llava.load_state_dict(state)
    words = rng.integers(3, IMAGE, size=9)
    ids = np.concatenate([[1], words[:4], np.full(GRID**2, IMAGE), words[4:]]).astype(np.int32)
    expected = their_logits(llava, ids, pixels)
    ours = our_logits(directory, ids, pixels)[:, : expected.shape[1]]
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(their_logits(model, words), their_logits(llava, words), atol=1e-6, rtol=0)
    status, _, err = convert("to-hf", directory, tmp_path / "back", "--format", "llava-hf")
    assert status == 0 and f"image_newline is left out; --format {format_name} writes it" in err
    status, out, _ = convert("verify", theirs, tmp_path / "back")
    assert status == 0 and f"image_newline: in {theirs} alone, and not compared" in out


@pytest.mark.parametrize("kind", TILED)
def test_models_of_tiles_go_back(kind, tiled, tmp_path, convert):  # noqa: F811
    """As the class that they were: the same bytes, the same logits of a picture with its tiles, the same processor."""
    model, theirs, run, _ = tiled(kind)
    format_name, name, *_ = TILED[kind]
    back = tmp_path / "back"
    assert convert("to-hf", run, back, "--format", format_name)[0] == 0
    before, after = (load_file(directory / "model.safetensors") for directory in (theirs, back))
    rows = {name: TEXT["vocab_size"] for name in before if "embed_tokens" in name or "lm_head" in name}
    assert "image_newline" in before and len(before) == len(after) and len(rows) == 2
    for tensor_name, tensor in before.items():
        written = after[tensor_name.replace("vision_tower.", "vision_tower.vision_model.")][: rows.get(tensor_name)]
        assert written.dtype == tensor.dtype and written.tobytes() == tensor.tobytes(), tensor_name
    for file in ("preprocessor_config.json", "processor_config.json"):
        assert json.loads((back / file).read_text()) == json.loads((theirs / file).read_text())
    assert (back / "video_preprocessor_config.json").exists() == (kind == "llava_onevision")
    assert "auto_map" not in "".join(file.read_text() for file in back.glob("*.json"))

    auto = transformers.AutoModelForImageTextToText
    again, report = auto.from_pretrained(back, output_loading_info=True)
    assert type(again) is type(model) and not any(report.values()), report
    for key in ("image_grid_pinpoints", "vision_aspect_ratio", "image_token_id", "video_token_id", "image_seq_length"):
        assert getattr(again.config, key, None) == getattr(model.config, key, None), key
    assert json.loads((back / "config.json").read_text())["architectures"] == [f"{name}ForConditionalGeneration"]
    rng = np.random.default_rng(1)
    picture = picture_of(rng)
    made, inputs = (image_processor_of(d, kind)(picture, return_tensors="pt") for d in (theirs, back))
    assert made["pixel_values"].shape[1] == 4 and torch.equal(made["pixel_values"], inputs["pixel_values"])
    with torch.no_grad():
        (features,) = model.model.get_image_features(**made).pooler_output
        words = rng.integers(3, IMAGE - 1, size=9)
        ids = torch.tensor(np.concatenate([[1], words[:4], np.full(len(features), IMAGE), words[4:]])[None])
        expected, logits = (m.eval()(input_ids=ids, **inputs).logits for m in (model, again))
    assert torch.equal(logits[..., : expected.shape[-1]], expected) and expected.abs().max() > 1
    if kind == "llava_next":  # LlavaOnevisionProcessor needs torchvision, for videos
        ours, processor = (transformers.AutoProcessor.from_pretrained(directory) for directory in (back, theirs))
        asked = [p(text="what is <image>?", images=picture, return_tensors="pt") for p in (ours, processor)]
        assert type(ours) is type(processor) and all(torch.equal(asked[0][key], asked[1][key]) for key in asked[1])
        assert (asked[0]["input_ids"] == IMAGE).sum() == len(features)

    status, out, _ = convert("verify", theirs, back)
    assert status == 0 and "alone" not in out
    for path in (theirs, run):
        assert f"image_newline: float32 [32], kept for to-hf --format {format_name}" in convert("inspect", path)[1]
    after["image_newline"][5] += 1
    save_file(after, back / "model.safetensors", {"format": "pt"})
    status, out, _ = convert("verify", run, back)
    assert status == 1 and "worst difference: 1 in image_newline" in out
    after["image_newline"] = after["image_newline"][:-1]
    save_file(after, back / "model.safetensors", {"format": "pt"})
    expected = "image_newline: expected float32, float16, bfloat16 of shape [32]; found float32 [31]"
    assert expected in convert("to-jax", back, tmp_path / "again")[2]

    (other,) = (other for other, *_ in TILED.values() if other != format_name)
    status, _, err = convert("to-hf", run, tmp_path / "other", "--format", other)
    expected = f"expected a run with the image_newline of a {other.replace('-', '_')}, found that of a {kind}"
    assert status == 2 and err == f"error: {run}: format {other}: {expected}\n" and not (tmp_path / "other").exists()


def test_tiles_go_with_a_run(tiled, tmp_path, convert):  # noqa: F811
    """Through training with LoRA and merging, with the pixels of their processor, and out again."""
    model, theirs, base, _ = tiled("llava_next")
    config = tiny.config(tmp_path / "lora", train__steps=1, optim__warmup_steps=0)
    with config.unlocked():
        config.model = load_config(base / "config.json").model
    config.init_from, config.model.lora.rank = str(base), 2
    train(config)
    assert (tmp_path / "lora" / TILES).read_bytes() == (base / TILES).read_bytes()
    assert convert("merge", tmp_path / "lora", tmp_path / "merged")[0] == 0
    assert convert("to-hf", tmp_path / "merged", tmp_path / "back", "--format", "llava-next")[0] == 0
    before, after = (load_file(d / "model.safetensors") for d in (theirs, tmp_path / "back"))
    assert before["image_newline"].tobytes() == after["image_newline"].tobytes()
    changed = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert before[changed].tobytes() != after[changed].tobytes()
    again, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()) and again.config.image_grid_pinpoints == PINPOINTS

    written = load_config(tmp_path / "merged" / "config.json")
    assert written.data.aspect_ratio == "stretch" != default_config().data.aspect_ratio
    written.data.aspect_ratio = "pad"
    save_config(written, tmp_path / "merged" / "config.json")

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            to_hf(tmp_path / "merged", tmp_path / "more", "llava-next", None, 10**9)
        assert not (tmp_path / "more").exists()

    refused("config.json: data.aspect_ratio: .* checkpoint that was converted: expected 'stretch', found 'pad'")
    kept = read_tiles(tmp_path / "merged", TEXT["hidden_size"])
    write_tiles(tmp_path / "merged", dataclasses.replace(kept, files={}, pixels={}))
    (line,) = to_hf(tmp_path / "merged", tmp_path / "bare", "llava-next", None, 10**9)
    assert line == "no processor is written: the checkpoint that was converted had none"
    assert not [*(tmp_path / "bare").glob("*processor*")]
    (tmp_path / "merged" / TILES).unlink()
    refused("merged: format llava-next: expected a run with the image_newline of a llava_next, found none")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_is_kept_of_tiles_is_read_as_it_was(dtype, tmp_path):
    newline = np.random.default_rng(0).normal(size=8).astype(dtype)
    tiles = Tiles(newline, {"model_type": "llava_next"}, {"processor_config.json": {"patch_size": 14}}, {"data.a": 0.1})
    write_tiles(tmp_path, tiles)
    again = read_tiles(tmp_path, 8)
    assert again.newline.dtype == dtype and again.newline.tobytes() == newline.tobytes()
    assert dataclasses.replace(again, newline=newline) == tiles
    with pytest.raises(UserError, match=r"tiles.json: newline: expected 16 values, found 8: another run's$"):
        read_tiles(tmp_path, 16)
    whole = (tmp_path / TILES).read_text()

    def refused(text: str, expected: str) -> None:
        (tmp_path / TILES).write_text(text)
        with pytest.raises(UserError, match=f"tiles.json: {expected}"):
            read_tiles(tmp_path, 8)

    refused(whole.replace("14", "16", 1), "damaged: expected its checksum, found another")
    refused(whole[:-9], "not readable as JSON")
    for edited, expected in (
        (whole.replace('"version": 1', '"version": 2'), "expected version 1: written by a later version"),
        (whole.replace("llava_next", "llava"), "not what to-jax writes"),
        (whole.replace('"newline"', '"newlines"'), "not what to-jax writes"),
        (whole.replace("processor_config", "../config"), "not what to-jax writes: .*../config.json unknown"),
        (whole.replace("model_type", "text_config"), "not what to-jax writes"),
        (re.sub(r'\{\s*"patch_size": 14\s*\}', "14", whole), "not what to-jax writes: .*expected objects"),
    ):
        content = json.loads(edited)
        del content["checksum"]
        sum_ = zlib.crc32(json.dumps(content, sort_keys=True).encode())
        refused(json.dumps(content | {"checksum": sum_}), expected)


def test_the_last_hidden_state_is_before_the_last_norm():
    """In transformers, whose numbers we follow: SigLIP's, as CLIP's."""
    tower = randomized(transformers.SiglipVisionModel(siglip()))
    with torch.no_grad():
        made = tower(torch.randn(1, 3, SIDE, SIDE), output_hidden_states=True)
        torch.testing.assert_close(tower.post_layernorm(made.hidden_states[-1]), made.last_hidden_state)
    assert (made.hidden_states[-1] - made.last_hidden_state).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["SigLIP", "CLIP"])
def test_parts(kind, tmp_path, tokenizer, convert):  # noqa: F811
    """A whole SigLIP or CLIP, of which only the tower is read, and a projector of three layers (mlp3x_gelu).

    SigLIP's has no biases; the other goes through the released code's format, and comes back the same.
    """
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    if kind == "SigLIP":
        config = transformers.SiglipConfig(text_config=text, vision_config=siglip().to_dict())
        whole = randomized(transformers.SiglipModel(config))
    else:
        config = transformers.CLIPConfig(text_config=text, vision_config=clip(hidden_act="gelu").to_dict())
        whole = randomized(transformers.CLIPModel(config))
    layers = [torch.nn.Linear(inputs, 32, bias=kind == "CLIP") for inputs in (24, 32, 32)]
    projector = randomized(torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1], torch.nn.GELU(), layers[2]))
    llm = randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))
    whole.save_pretrained(tmp_path / "tower"), llm.save_pretrained(tmp_path / "llm")
    torch.save({f"mm_projector.{name}": x for name, x in projector.state_dict().items()}, tmp_path / "projector.bin")
    status, _, err = convert(
        "to-jax", tmp_path / "run", "--llm", tmp_path / "llm", "--vision-tower", tmp_path / "tower",
        "--projector", tmp_path / "projector.bin", "--tokenizer", tokenizer,
    )  # fmt: skip
    assert status == 0, err
    run = load_run(tmp_path / "run")
    assert (run.processor.mean == (0.5, 0.5, 0.5)) == (kind == "SigLIP") and run.processor.aspect_ratio == "pad"
    pixels = np.random.default_rng(0).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    with torch.no_grad():
        hidden = whole.vision_model(torch.tensor(pixels), output_hidden_states=True).hidden_states[-2]
        expected = projector(hidden[:, int(kind == "CLIP") :])[0].numpy()
    features = jax.jit(run.model.encode_images)(pixels.transpose(0, 2, 3, 1)[None])[0, 0]
    np.testing.assert_allclose(np.asarray(features), expected, atol=1e-4, rtol=0)
    if kind == "CLIP":
        assert convert("to-hf", tmp_path / "run", tmp_path / "back", "--format", "voco")[0] == 0
        assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_projector_type"] == "mlp3x_gelu"
        status, out, _ = convert("verify", tmp_path / "run", tmp_path / "back")
        assert status == 0, out
        return
    tensors = load_file(tmp_path / "tower" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("vision_model.post_layernorm.bias"))
    save_file(tensors | {f"{name}.more": tensors[name]}, tmp_path / "tower" / "model.safetensors")
    status, out, _ = convert("inspect", "--llm", tmp_path / "llm", "--vision-tower", tmp_path / "tower")
    assert status == 2 and f"{name}.more unknown" in out


def model_of(vision: ViTConfig, **changes) -> VoCoConfig:
    return VoCoConfig(vision=vision, voco_token_id=3, **changes)


SIGLIP = presets.VIT["siglip-base-16-224"]


@pytest.mark.parametrize(
    ("model", "format_name", "message"),
    [
        (model_of(SIGLIP), "voco", "a vision tower that is not CLIP's"),
        (model_of(ViTConfig(class_token=False)), "llava-hf", "a vision tower that is neither CLIP's nor SigLIP's"),
        (model_of(ViTConfig(further_layers=(-5,))), "voco", r"vision.further_layers \(-5,\)"),
        (model_of(ViTConfig(), projector_bias=False), "voco", "projector_bias False"),
        (model_of(ViTConfig(), projector_layers=4), "voco", "projector_layers 4"),
        (model_of(SIGLIP, projector_layers=3), "llava-hf", "projector_layers 3"),
    ],
)
def test_what_a_format_cannot_store(model, format_name, message):
    with pytest.raises(UserError, match=rf"^run: {message}: format {format_name} cannot store it$"):
        check_run(Path("run"), None, model, format_name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vision_config": {"model_type": "siglip2_vision_model", "num_patches": 256}},
            "vision_config.model_type: expected 'siglip_vision_model', .*'siglip2_vision_model': NaFlex towers are not",
        ),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "vision_feature_select_strategy: expected 'full', found 'default': .* no class token, .* the first patch",
        ),
        (
            {"vision_config": {"model_type": "siglip_vision_model", "num_channels": 4}},
            "vision_config.num_channels: expected 3, found 4",
        ),
        (
            {"vision_config": {"model_type": "dinov2"}},
            "vision_config.model_type: expected 'clip_vision_model' or 'clip' or 'siglip_vision_model' or 'siglip', fo",
        ),
        ({"vision_feature_layer": [-2, "last"]}, r"vision_feature_layer: expected a layer or a list of layers, found"),
        ({"vision_feature_layer": []}, r"vision_feature_layer: expected a layer or a list of layers, found \[\]"),
        ({"vision_feature_layer": [-2, -26]}, "further_layers: expected -25 to 24, found -26"),
    ],
)
def test_towers_that_are_refused(fields, message):
    with pytest.raises(UserError, match=f"^config.json: {message}") as error:
        hf_vision(fields, FILE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["siglip2-base-16-256", "siglip2-so400m-14-384"])
def test_siglip_2_of_fixed_resolution_is_siglip(name):
    """As the hub has it: what a config leaves out is transformers' default."""
    fields = {
        "siglip2-base-16-256": {"image_size": 256},
        "siglip2-so400m-14-384": {
            "image_size": 384, "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14,
        },
    }[name]  # fmt: skip
    written = {"model_type": "siglip", "vision_config": fields | {"model_type": "siglip_vision_model"}}
    theirs = transformers.SiglipConfig(**written).to_dict()
    for config in written, {"model_type": "siglip", "vision_config": theirs["vision_config"]}:
        found = hf_vision({"vision_config": config["vision_config"], "vision_feature_select_strategy": "full"}, FILE)
        assert found == presets.VIT[name]


def test_towers_by_name():
    for name, preset in HUB_TOWERS.items():
        found = from_name(name, FILE, select_layer=-3, select_feature="patch")
        assert found.select_layer == -3 and found.num_features == presets.VIT[preset].num_patches
    with pytest.raises(UserError, match="^config.json: select_feature: expected 'patch', as there is no class token"):
        from_name("google/siglip-so400m-patch14-384", FILE, select_layer=-2, select_feature="cls_patch")
    assert clip_from_hf({"model_type": "clip_vision_model"}, FILE).patch_size == 32
