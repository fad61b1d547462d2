"""FLOPs by formula against the sizes of the model's kernels, and against what a step's program holds; wrong configs."""

import dataclasses
import math

import jax
import pytest

from tests.helpers import tiny
from tests.helpers.commands import run_main
from voco_jax.aot import __main__ as aot
from voco_jax.aot.compile import compile_step
from voco_jax.aot.programs import find_tokenizer, make_program
from voco_jax.config import default_config
from voco_jax.data.tokenizer import train_tokenizer
from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model
from voco_jax.models.flops import training_flops
from voco_jax.models.linear import LoRAConfig
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig
from voco_jax.parallel.chips import CHIPS
from voco_jax.parallel.mesh import make_mesh

CONFIG = VoCoConfig(
    llama=LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    vision=ViTConfig(
        image_size=8, patch_size=2, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        select_layer=-1,
    ),
    num_voco_tokens=3, voco_token_id=49,
)  # fmt: skip
ROWS, LENGTH, IMAGES, PATCHES = 4, 20, 5, 16
TOKENS = ROWS * LENGTH


def kernels(config, *parts: str) -> int:
    """Numbers in the kernels of some parts, as the model has them."""
    _, params = abstract_model(config)
    named = jax.tree_util.tree_leaves_with_path(params)
    names = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in named]
    return sum(math.prod(x.shape) for name, x in names if name.startswith(parts) and name.endswith("kernel"))


def read_forward(config) -> float:
    """Of the read stream's layers; as `parts_forward`."""
    attention = 2 * config.llama.num_attention_heads * config.llama.head_dim
    return TOKENS * (2 * kernels(config, "llama.layers") + config.llama.num_hidden_layers * attention * LENGTH)


def parts_forward(config) -> dict[str, float]:
    """Two for each number of a kernel and token, and attention over all visible pairs (half of a causal square)."""
    llama, vision, S = config.llama, config.vision, config.compress_length
    layer = kernels(config, "llama.layers") / llama.num_hidden_layers
    attention = 2 * llama.num_attention_heads * llama.head_dim
    whole = (llama.num_hidden_layers - 1) * (2 * layer + attention * S)
    last = 2 * kernels(config, "llama.layers.k_proj", "llama.layers.v_proj") / llama.num_hidden_layers
    tower = vision.num_hidden_layers * 4 * vision.hidden_size * (PATCHES + 1) ** 2
    tower += 2 * (PATCHES + 1) * kernels(config, "vision_tower.layers")
    return {
        "vision_tower": IMAGES * (tower + 2 * PATCHES * kernels(config, "vision_tower.patch_embedding")),
        "projector": IMAGES * PATCHES * 2 * kernels(config, "projector"),
        "llama.layers": read_forward(config) + IMAGES * S * (whole + last),
        "llama.lm_head": TOKENS * 2 * kernels(config, "llama.lm_head"),
    }


@pytest.mark.parametrize(
    ("freeze", "times"),  # forward, gradients of inputs, gradients of parameters
    [
        ((), (3, 3, 3, 3)),
        (("vision_tower",), (1, 3, 3, 3)),
        (("vision_tower", "llama"), (1, 3, 2, 2)),
        (("vision_tower", "llama.layers"), (1, 3, 2, 3)),
        (("vision_tower", "projector"), (1, 1, 3, 3)),
        (("vision_tower", "projector", "llama.layers"), (1, 1, 2, 3)),  # the embedding before it trains
        # A frozen embedding's VoCo row trains, and has its gradient through the layers
        (("vision_tower", "projector", "llama.embed_tokens", "llama.layers"), (1, 1, 2, 3)),
    ],
)
def test_a_training_step(freeze, times):
    expected = sum(n * flops for n, flops in zip(times, parts_forward(CONFIG).values(), strict=True))
    assert training_flops(CONFIG, ROWS, LENGTH, IMAGES, freeze) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("freeze", "backward"),  # passes over the read stream's layers
    [
        ((), 2),
        (("llama.layers",), 1),
        (("llama.embed_tokens", "llama.layers"), 0),
    ],  # the VoCo token's row does not train
)
def test_constant_memories(freeze, backward):
    """Images go forward alone, whatever trains."""
    forward = parts_forward(CONFIG)
    expected = sum(forward.values()) + backward * read_forward(CONFIG) + 2 * forward["llama.lm_head"]
    found = training_flops(CONFIG, ROWS, LENGTH, IMAGES, freeze, compress_gradients=False)
    assert found == pytest.approx(expected, rel=1e-12)


def test_without_voco_tokens_nothing_before_frozen_layers_trains():
    pooled = dataclasses.replace(CONFIG, compressor="average_pool")
    freeze = ("vision_tower", "projector", "llama.embed_tokens", "llama.layers")
    row = training_flops(dataclasses.replace(CONFIG, compressor="none"), ROWS, LENGTH, IMAGES, freeze)
    read = CONFIG.llama.num_hidden_layers * TOKENS * 2 * 4 * 8 * LENGTH
    read += 2 * TOKENS * kernels(CONFIG, "llama.layers")
    assert row - training_flops(pooled, ROWS, LENGTH, IMAGES, freeze) == pytest.approx(read)


def test_lora():
    """Its own matrices three times, the language model's kernels twice, all else as ever."""
    targets = ("q_proj", "k_proj", "down_proj")
    adapted = dataclasses.replace(CONFIG, lora=LoRAConfig(4, 8.0, targets))
    _, params = abstract_model(adapted)
    matrices = {name: params["llama"]["layers"][name]["lora"] for name in targets}
    size = {name: sum(x.size for x in jax.tree.leaves(lora)) / 3 for name, lora in matrices.items()}  # of 3 layers
    compressed = IMAGES * CONFIG.compress_length
    low_rank = 2 * sum(size.values()) * (3 * TOKENS + 2 * compressed) + 2 * size["k_proj"] * compressed
    times = dict(zip(parts_forward(CONFIG), (1, 3, 2, 2), strict=True))
    expected = 3 * low_rank + sum(n * parts_forward(CONFIG)[part] for part, n in times.items())
    assert training_flops(adapted, ROWS, LENGTH, IMAGES, ("vision_tower",)) == pytest.approx(expected, rel=1e-12)


def test_a_tied_head_is_the_embedding():
    tied = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, tie_word_embeddings=True))
    head = parts_forward(CONFIG)["llama.lm_head"]
    assert training_flops(tied, ROWS, LENGTH, IMAGES) == training_flops(CONFIG, ROWS, LENGTH, IMAGES)
    frozen = [training_flops(c, ROWS, LENGTH, IMAGES, ("llama.embed_tokens",)) for c in (CONFIG, tied)]
    assert frozen[0] - frozen[1] == pytest.approx(head)


FROZEN = {"train.freeze": ("vision_tower", "llama")}
LORA = {"train.freeze": ("vision_tower",), "model.lora.rank": 16}
CONSTANT = {"train.compress_gradients": False}
EMBEDDING = {"model.compressor": "voco_embedding"}
BY_ITSELF = {"train.loss": "distillation", "train.distill.teacher": "self"}
BY_A_RUN = {"train.loss": "distillation", "train.distill.teacher": "runs/not_here"}


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("train", {}), ("train", FROZEN), ("train", LORA), ("train", CONSTANT), ("train", BY_ITSELF),
        ("train", BY_ITSELF | {"train.distill.whole_weight": 1.0}), ("train", BY_A_RUN),
        ("train", BY_ITSELF | {"train.distill.teacher": "ema"}),
        ("compress", {}), ("read", {}), ("read", LORA), ("decode", {}),
        ("train", EMBEDDING), ("compress", EMBEDDING), ("read", EMBEDDING),
    ],
)  # fmt: skip
def test_programs_hold_the_flops_of_the_formula(step, changes):
    """To a few percent: programs also hold what is left out, and XLA's attention computes the whole square."""
    config = default_config()
    config.update_from_flattened_dict(changes)
    config.model.llama.update(dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=8192))
    config.model.update(dict(dtype="float32", unroll_layers=True))
    config.data.update(dict(batch_size=2, images_per_pack=2, rows_per_pack=1, row_length=64))
    mesh = make_mesh(config.mesh)
    program = make_program(config, step, mesh)
    with jax.set_mesh(mesh):
        found = program.function.lower(*program.arguments).cost_analysis()["flops"]
    assert 1 < found / program.model_flops < 1.25


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        ("train", {"data.row_length": 0}, "config.data.row_length: expected the tokens of a row, found 0"),
        ("train", {"data.rows_per_pack": 0}, "config.data.rows_per_pack: expected the rows of a pack, found 0"),
        (
            "train",
            {"model.llama.num_attention_heads": 3},
            r"config.model.llama.num_attention_heads: expected .*, found 3",
        ),
        ("compress", {"data.images_per_pack": 0}, "config.data.images_per_pack: expected at least 1 .*, found 0"),
        (
            "compress",
            {"model.compressor": "none"},
            "config.model.compressor: compress needs 'voco' or .*, found 'none'",
        ),
        ("train", {"model.attention": "cudnn"}, "config.model.attention: 'cudnn' needs an NVIDIA GPU, found"),
        ("read", {"data.images_per_pack": 64}, "config.data.row_length: expected room for text beside 64 slots"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(step, changes, message):
    config = default_config()
    config.data.row_length, config.data.rows_per_pack = 64, 8
    config.update_from_flattened_dict(changes)
    mesh = make_mesh(config.mesh)
    with pytest.raises(UserError, match=message) as error:
        compile_step(make_program(config, step, mesh), mesh, CHIPS["v5e"])
    assert "\n" not in str(error.value)


def test_the_prompt_is_the_tokenizers(tmp_path):
    """A byte-level tokenizer has a token less between image and VoCo tokens than Llama's, which are assumed without."""
    train_tokenizer(["a text"], 300).save_pretrained(tmp_path / "tokenizer")
    config = default_config()
    config.data.row_length, config.data.rows_per_pack = 64, 1
    mesh = make_mesh(config.mesh)
    assumed = make_program(config, "compress", mesh)
    assert find_tokenizer(config.tokenizer.source) is None
    config.tokenizer.source = "some/name"  # of the hub: not downloaded
    assert find_tokenizer(config.tokenizer.source) is None
    config.tokenizer.source = str(tmp_path / "tokenizer")
    known = make_program(config, "compress", mesh, find_tokenizer(config.tokenizer.source))
    assert assumed.compress_tokens - known.compress_tokens == assumed.images == known.images == config.data.batch_size
    assert known.model_flops < assumed.model_flops


@pytest.mark.tpu_compile
@pytest.mark.parametrize("known", [False, True])
def test_an_estimate_says_what_is_assumed(monkeypatch, capsys, tmp_path, known):
    arguments = ["--config", tiny.CONFIG_FILE, "--config.data.row_length=64", "--config.model.attention=cudnn"]
    if known:
        train_tokenizer(["a text"], 300).save_pretrained(tmp_path)
        arguments.append(f"--config.tokenizer.source={tmp_path}")
    _, _, error = run_main(aot, monkeypatch, capsys, *arguments, "--topology=v5e:2x2")
    line = "assumed: a tokenizer with 3 tokens around an image, as Llama's (tokenizer.source is 'train')"
    assert (line in error.splitlines()) != known


@pytest.mark.tpu_compile
def test_the_command_line_says_so(monkeypatch, capsys):
    arguments = ["--config", tiny.CONFIG_FILE, "--config.data.row_length=64", "--config.model.attention=cudnn"]
    status, output, error = run_main(aot, monkeypatch, capsys, *arguments, "--topology=v5e:2x2")
    assert (status, output) == (2, "")
    assert error.splitlines()[-1].startswith("error: config.model.attention: 'cudnn' needs an NVIDIA GPU")
