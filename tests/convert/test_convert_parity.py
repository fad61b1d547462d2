"""Converted models against transformers' own, in float32: small random models, made here, through the command line."""

import dataclasses
import json

import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from tests.conftest import DATA
from tests.convert.test_convert import TOKENIZER, convert  # noqa: F401 (a fixture)
from tests.helpers import reference
from voco_jax.checkpoint.run import load_run
from voco_jax.convert.jax_checkpoint import of_newest
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.models.voco import Read

pytestmark = pytest.mark.peer

VOCABULARY, PATCHES, IMAGE = 431, 4, 430  # more rows than the tokenizer has tokens, and an odd number of them
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=14,
    projection_dim=16,
)  # fmt: skip
LLAMA_3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
CASES = {
    "grouped heads": {},
    "tied embeddings": dict(tie_word_embeddings=True),
    "every head its own": dict(num_key_value_heads=4, vocab_size=437),
    "Llama 3": dict(rope_parameters=LLAMA_3, head_dim=12),
    "Qwen2": dict(model_type="qwen2", tie_word_embeddings=True, rope_parameters=dict(rope_theta=1e6)),
    "Qwen3": dict(model_type="qwen3", head_dim=12),
    "Mistral": dict(model_type="mistral", sliding_window=None),
    "Mistral v0.1": dict(model_type="mistral", sliding_window=7),
    "Qwen2, in windows": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=0, num_key_value_heads=1
    ),
}


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer.save_pretrained(directory)
    return directory


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases too, which would start at one and zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(float(parameter.ndim == 1) / 2)
    return model.eval()


def make_llava(model_type: str = "llama", **text) -> transformers.LlavaForConditionalGeneration:
    text = TEXT | text
    config = transformers.LlavaConfig(
        text_config=transformers.AutoConfig.for_model(model_type, **text),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    return randomized(transformers.LlavaForConditionalGeneration(config))


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(token ids with one image among them, pixel values [1, 3, height, width])"""
    rng = np.random.default_rng(seed)
    text = rng.integers(3, IMAGE, size=20)
    ids = np.concatenate([[1], text[:5], np.full(PATCHES, IMAGE), text[5:]]).astype(np.int32)
    return ids, rng.normal(size=(1, 3, 28, 28)).astype(np.float32)


def their_logits(model, ids, pixels=None) -> np.ndarray:
    arguments = {} if pixels is None else {"pixel_values": torch.tensor(pixels)}
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids[None], dtype=torch.long), **arguments).logits[0].float().numpy()


def our_logits(run, ids, pixels=None) -> np.ndarray:
    slot_index = np.where(ids == IMAGE, np.cumsum(ids == IMAGE) - 1, -1).astype(np.int32)
    sample = Sample(ids, np.ones(len(ids), bool), slot_index, num_images=0 if pixels is None else 1)
    row = pack_row([sample], len(ids))
    read = Read(*(getattr(row, name)[None] for name in Read._fields))
    model = load_run(run).model
    return np.asarray(model(read, None if pixels is None else pixels.transpose(0, 2, 3, 1)[None])[0])


@pytest.mark.parametrize("case", CASES)
def test_llava(case, tmp_path, tokenizer, convert):  # noqa: F811
    """Both ways: transformers' model read, and what is written opens as transformers' model."""
    model = make_llava(**CASES[case])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    status, _, err = convert(
        "to-jax", tmp_path / "theirs", tmp_path / "run", "--tokenizer", tokenizer, "--compressor", "none"
    )
    assert status == 0, err
    ids, pixels = inputs()
    expected = their_logits(model, ids, pixels)
    np.testing.assert_allclose(our_logits(tmp_path / "run", ids, pixels), expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1

    assert convert("to-hf", tmp_path / "run", tmp_path / "back", "--format", "llava-hf")[0] == 0
    again, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    ids = np.where(ids == IMAGE, again.config.image_token_id, ids)
    np.testing.assert_allclose(their_logits(again.eval(), ids, pixels), expected, atol=1e-6, rtol=0)
    assert convert("verify", tmp_path / "theirs", tmp_path / "back")[0] == 0


def test_names_of_other_versions(tmp_path, tokenizer, convert):  # noqa: F811
    """The tensors of one model under the names of transformers before 4.52, of 4.52 and later, and of 5."""
    make_llava().save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    heads = {name.split(".")[0] for name in tensors}
    assert heads == {"language_model", "multi_modal_projector", "vision_tower"}

    def before_4_52(name):
        return name.replace("vision_tower.", "vision_tower.vision_model.")

    def state_dict(name):
        name = before_4_52(name).replace("language_model.model.", "model.language_model.")
        name = name.replace("language_model.lm_head", "lm_head")
        return name if name.startswith(("model.", "lm_head")) else f"model.{name}"

    for number, rename in enumerate((before_4_52, state_dict)):
        other = tmp_path / f"b{number}"
        other.mkdir()
        save_file({rename(name): tensor for name, tensor in tensors.items()}, other / "model.safetensors")
        (other / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
        assert load_file(other / "model.safetensors").keys() != tensors.keys()
        status, out, _ = convert("verify", tmp_path / "a", other)
        assert status == 0 and f"{len(tensors)} of {len(tensors)} tensors are identical" in out


@pytest.mark.parametrize("files", ["safetensors", "bin", "bin in shards", "whole CLIP"])
def test_parts(files, tmp_path, tokenizer, convert):  # noqa: F811
    """A language model, a vision tower and a projector, each from its own place and in PyTorch's own files too."""
    llm = randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))
    if files == "whole CLIP":
        text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
        clip = randomized(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION)))
        vision = clip.vision_model
    else:
        clip = vision = randomized(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    projector = randomized(torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)))
    llm.save_pretrained(tmp_path / "llm"), clip.save_pretrained(tmp_path / "clip")
    if files.startswith("bin"):
        (tmp_path / "llm" / "model.safetensors").unlink()
        state = llm.state_dict()
        halves = [dict(list(state.items())[i::2]) for i in (0, 1)] if files == "bin in shards" else [state]
        names = (
            [f"pytorch_model-{i + 1:05}-of-00002.bin" for i in (0, 1)] if len(halves) == 2 else ["pytorch_model.bin"]
        )
        for name, half in zip(names, halves, strict=True):
            torch.save(half, tmp_path / "llm" / name)
        if len(halves) == 2:
            weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
            index = {"metadata": {}, "weight_map": weight_map}
            (tmp_path / "llm" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(
        {f"model.mm_projector.{name}": parameter for name, parameter in projector.state_dict().items()},
        tmp_path / "mm_projector.bin",
    )
    status, _, err = convert(
        "to-jax", tmp_path / "run", "--llm", tmp_path / "llm", "--vision-tower", tmp_path / "clip",
        "--projector", tmp_path / "mm_projector.bin", "--tokenizer", tokenizer,
    )  # fmt: skip
    assert status == 0, err
    ids, pixels = inputs()
    text = ids[ids != IMAGE]
    np.testing.assert_allclose(our_logits(tmp_path / "run", text), their_logits(llm, text), atol=1e-4, rtol=0)
    with torch.no_grad():
        hidden = vision(pixel_values=torch.tensor(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = projector(hidden)[0].numpy()
    features = load_run(tmp_path / "run").model.encode_images(pixels.transpose(0, 2, 3, 1)[None])[0, 0]
    np.testing.assert_allclose(np.asarray(features), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_pictures_are_prepared_alike(aspect_ratio, tmp_path, convert):  # noqa: F811
    """The released config's way of making squares is ours, then that of transformers' processor, then ours again."""
    source = tmp_path / "source"
    source.mkdir()
    for name in "model.safetensors", "vision_tower":
        (source / name).symlink_to(reference.DIRECTORY / name)
    config = json.loads((reference.DIRECTORY / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": aspect_ratio}))
    assert convert("to-jax", source, tmp_path / "run", *TOKENIZER)[0] == 0
    assert convert("to-hf", tmp_path / "run", tmp_path / "hf", "--format", "llava-hf")[0] == 0
    assert convert("to-hf", tmp_path / "run", tmp_path / "voco", "--format", "voco")[0] == 0
    assert json.loads((tmp_path / "voco" / "config.json").read_text())["image_aspect_ratio"] == aspect_ratio
    assert convert("to-jax", tmp_path / "hf", tmp_path / "again")[0] == 0

    image = Image.open(reference.DIRECTORY / "coffee_tall.png").convert("RGB")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    made = theirs(text="USER: <image>\nwhat is it? ASSISTANT:", images=image, return_tensors="np")
    run, again = load_run(tmp_path / "run"), load_run(tmp_path / "again")
    assert run.processor == dataclasses.replace(again.processor, transparency="drop")  # as the released code does
    assert run.processor.aspect_ratio == {"pad": "pad", "square": "crop"}[aspect_ratio]
    np.testing.assert_allclose(made["pixel_values"][0].transpose(1, 2, 0), run.processor(image), atol=1e-6, rtol=0)
    image_token = theirs.tokenizer.convert_tokens_to_ids("<image>")
    assert (made["input_ids"] == image_token).sum() == run.model.config.vision.num_features


def test_parts_of_several_dtypes(tmp_path, tokenizer, convert):  # noqa: F811
    """Each is stored as it came, and restored without loss."""
    llm = randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))).to(torch.float16)
    clip = randomized(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    projector = randomized(torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)))
    llm.save_pretrained(tmp_path / "llm"), clip.save_pretrained(tmp_path / "clip")
    torch.save(
        {f"mm_projector.{n}": p.to(torch.bfloat16) for n, p in projector.state_dict().items()}, tmp_path / "p.bin"
    )
    status, _, err = convert(
        "to-jax", tmp_path / "run", "--llm", tmp_path / "llm", "--vision-tower", tmp_path / "clip",
        "--projector", tmp_path / "p.bin", "--tokenizer", tokenizer,
    )  # fmt: skip
    assert status == 0, err
    stored = of_newest(tmp_path / "run", lambda stored: stored)
    dtypes = {path.split(".")[0]: stored.dtype(path).name for path in stored.shapes}
    assert dtypes == {"llama": "float16", "vision_tower": "float32", "projector": "bfloat16"}
    model = load_run(tmp_path / "run").model
    expected = clip.state_dict()
    (name,) = (name for name in expected if name.endswith("class_embedding"))
    np.testing.assert_array_equal(np.asarray(model.vision_tower.class_embedding[...]), expected[name].numpy())
    np.testing.assert_array_equal(
        np.asarray(model.projector.linear_1.kernel[...]),
        projector[0].weight.T.to(torch.bfloat16).float().detach().numpy(),
    )


def test_a_padded_row_becomes_that_of_a_new_token(tmp_path, convert):  # noqa: F811
    """Hugging Face's LLaVA has more rows than tokens: `<voco>` is new there, though a row is not."""
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(DATA / "llama_tokenizer")
    plain.add_tokens(["<image>"], special_tokens=True)
    plain.save_pretrained(tmp_path / "tokenizer")
    model = make_llava(vocab_size=32064)
    model.config.image_token_index = 32000
    model.save_pretrained(tmp_path / "theirs")
    rows = model.get_input_embeddings().weight.detach().numpy()
    for init in "mean", "normal":
        run = tmp_path / init
        arguments = ["to-jax", tmp_path / "theirs", run, "--tokenizer", tmp_path / "tokenizer", "--voco-init", init]
        assert convert(*arguments)[0] == 0
        ours = load_run(run).model
        embedding = np.asarray(ours.llama.embed_tokens.embedding[...])
        assert ours.config.voco_token_id == 32001 and embedding.shape == (32128, 32)
        assert not embedding[len(rows) :].any()
        others = np.arange(len(rows)) != 32001
        np.testing.assert_array_equal(embedding[: len(rows)][others], rows[others])
        if init == "mean":  # of the rows that tokens have, and not of padding
            np.testing.assert_allclose(embedding[32001], rows[:32001].mean(0), atol=1e-5)
            assert np.abs(rows[:32001].mean(0) - rows[others].mean(0)).max() > 2e-5
        else:
            assert not np.array_equal(embedding[32001], rows[32001]) and np.abs(embedding[32001]).max() < 0.1
    for file in (tmp_path / "tokenizer").iterdir():
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    status, out, _ = convert("verify", tmp_path / "theirs", tmp_path / "mean")
    assert status == 0 and "row 32001 differs: <voco> in one, no token in the other" in out
    assert convert("verify", tmp_path / "normal", tmp_path / "mean")[0] == 1  # both have the token


def test_tied_at_the_top_of_the_config(tmp_path, tokenizer, convert):  # noqa: F811
    """transformers 5 may write the text config's default below; and a head that is stored all the same is the same."""
    make_llava(tie_word_embeddings=True).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["tie_word_embeddings"] = False
    file.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert convert("to-jax", tmp_path / "theirs", tmp_path / "run", "--tokenizer", tokenizer)[0] == 0
    weights = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"language_model.lm_head.weight": tensors["language_model.model.embed_tokens.weight"]}, weights)
    assert convert("verify", tmp_path / "theirs", tmp_path / "run")[0] == 0
