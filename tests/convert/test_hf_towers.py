"""Vision towers, selected layers and projectors against transformers' own, in float32: small random models."""

import json
from pathlib import Path

import jax
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
from voco_jax.checkpoint.run import load_run
from voco_jax.convert.families.clip import from_hf as clip_from_hf
from voco_jax.convert.families.llava import hf_vision
from voco_jax.convert.families.vision import HUB_TOWERS, from_name
from voco_jax.convert.to_hf import check_run
from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig

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


TILED = {
    "llava_next": (
        clip(),
        dict(vision_feature_layer=-2),
        "mistral",
        dict(size={"shortest_edge": SIDE}, crop_size=SIDE),
    ),
    "llava_onevision": (siglip(vision_use_head=False), {}, "qwen2", dict(size={"height": SIDE, "width": SIDE})),
}


@pytest.mark.parametrize("kind", TILED)
def test_models_of_tiles(kind, tmp_path, tokenizer, convert):  # noqa: F811
    """Language model, tower and projector of LLaVA-NeXT and LLaVA-OneVision, and their view of the whole picture."""
    tower, selected, language, sizes = TILED[kind]
    text = transformers.AutoConfig.for_model(language, **TEXT)
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = transformers.AutoConfig.for_model(
        kind, text_config=text, vision_config=tower, image_token_index=IMAGE, image_grid_pinpoints=grid, **selected
    )
    model = randomized(transformers.AutoModelForImageTextToText.from_config(config))
    model.save_pretrained(tmp_path / "theirs")
    name = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[kind]
    processor = getattr(transformers, f"{name}ImageProcessorPil")(image_grid_pinpoints=grid, **sizes)
    processor.save_pretrained(tmp_path / "theirs")
    arguments = [tmp_path / "theirs", tmp_path / "run", "--tokenizer", tokenizer, "--compressor", "none"]
    status, _, err = convert("to-jax", *arguments)
    assert status == 0 and "image_newline is not read: pictures are looked at as a whole, without tiles" in err

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (23, 47, 3), np.uint8))
    run = load_run(tmp_path / "run")
    pixels = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])[:1]
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), run.processor(picture), atol=1.01 / 255 / 0.26, rtol=0)
    # A LLaVA of the same parts is what looks at whole pictures alone
    same = transformers.LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )  # fmt: skip
    llava = transformers.LlavaForConditionalGeneration(same).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "image_newline" not in name}
    llava.load_state_dict(state)
    words = rng.integers(3, IMAGE, size=9)
    ids = np.concatenate([[1], words[:4], np.full(GRID**2, IMAGE), words[4:]]).astype(np.int32)
    expected = their_logits(llava, ids, pixels)
    np.testing.assert_allclose(our_logits(tmp_path / "run", ids, pixels), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(their_logits(model, words), their_logits(llava, words), atol=1e-6, rtol=0)
    assert convert("to-hf", tmp_path / "run", tmp_path / "back", "--format", "llava-hf")[0] == 0
    status, out, _ = convert("verify", tmp_path / "theirs", tmp_path / "back")
    assert status == 0, out


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
