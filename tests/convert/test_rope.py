"""Rotary scalings against transformers' own: its tables, its logits, and in two streams."""

import dataclasses
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.helpers import oracle
from tests.models.test_two_streams import CONFIG, IMAGES, PATCHES, SEQUENCE_LENGTH, make, random_layout
from voco_jax.convert.families import llama
from voco_jax.convert.sources import open_source
from voco_jax.convert.to_jax import check_source, layers_of
from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model
from voco_jax.models.llama import LlamaConfig, RopeScaling, rope_tables
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import Read, VoCoConfig

pytestmark = pytest.mark.peer

FILE = Path("config.json")
SMALL = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=256, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "theta": dict(rope_theta=5e5),
    "theta inside": dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "linear, old": dict(rope_scaling={"type": "linear", "factor": 4.0}),
    "linear": dict(rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 2e4}),
    "dynamic, old": dict(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=1e5),
    "dynamic": dict(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}),
    "llama3": dict(rope_scaling={"rope_type": "llama3"} | LLAMA_3, rope_theta=5e5),
    "both spellings": dict(rope_scaling={"type": "llama3", "rope_type": "llama3"} | LLAMA_3),
    "yarn": dict(rope_parameters=YARN | {"rope_theta": 1e4}),
    "yarn, old": dict(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn of the longest": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "yarn, attention factor": dict(rope_scaling=YARN | {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn, mscale": dict(rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}),
    "yarn, one mscale": dict(rope_scaling=YARN | {"mscale": 0.7}),
    "yarn, not truncated": dict(rope_scaling=YARN | {"truncate": False}),
    "yarn, shrunk": dict(rope_scaling=YARN | {"factor": 0.5}),
    "length at the top": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=32),
    "head size": dict(rope_scaling=YARN, head_dim=24),
}


@pytest.mark.parametrize("case", CASES)
def test_tables_are_transformers(case):
    """Read from a config in its spelling; what is written back is read as the same by both."""
    fields = SMALL | CASES[case]
    ours = llama.from_hf(fields, FILE)
    for again in fields, llama.to_hf(ours):
        assert llama.from_hf(again, FILE) == ours
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**{k: v for k, v in again.items() if k != "model_type"}))
        positions = torch.arange(256)[None]
        expected_cos, expected_sin = (x[0].numpy() for x in theirs(torch.zeros(1), positions))
        cos, sin = (np.asarray(x)[:, 0] for x in rope_tables(ours, jnp.arange(256)))
        half = ours.head_dim // 2
        np.testing.assert_allclose(cos, expected_cos, atol=1e-4, rtol=0)
        np.testing.assert_allclose(sin[:, half:], expected_sin[:, half:], atol=1e-4, rtol=0)
        np.testing.assert_allclose(sin[:, :half], -expected_sin[:, :half], atol=1e-4, rtol=0)


def test_old_files_mean_llama_3():
    """A run's config.json from before other types has no `rope_type`."""
    assert RopeScaling(**LLAMA_3) == RopeScaling(8.0, 1.0, 4.0, 64, "llama3")


def test_a_null_is_not_set():
    scaling = {"rope_type": None, "type": "linear", "factor": 4.0}
    assert llama.from_hf(SMALL | {"rope_scaling": scaling}, FILE).rope_scaling == RopeScaling(4.0, rope_type="linear")


def test_a_context_of_16k():
    """Vicuna's: the positions before the stretch, and the length after it under a key of its own."""
    fields = SMALL | {"max_sequence_length": 1024, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert llama.from_hf(fields, FILE).max_position_embeddings == 1024
    assert llama.from_hf(SMALL | {"max_sequence_length": 1024}, FILE).max_position_embeddings == 256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type: expected default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: key 'factor' is missing"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type: expected default, linear.*; found None"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling: rope_type 'dynamic' and type 'linear': expected one of them",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling: expected numbers above 0"),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "rope_scaling.beta_fast: expected a number above 0, found -1"),
        ({"rope_scaling": YARN | {"mrope_section": [2]}}, "rope_scaling.mrope_section: unknown, and may change"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor: expected 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1 or None, found 0.5"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters: expected one of them, found two that differ",
        ),
    ],
)
def test_what_is_not_computed_is_refused(fields, message):
    with pytest.raises(UserError, match=r"^config.json: " + message) as error:
        llama.from_hf(SMALL | fields, FILE)
    assert "\n" not in str(error.value)


def our_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    """Of a Llama directory, read as `to-jax` reads it."""
    source = open_source(directory)
    vision = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    config = VoCoConfig(llama=source.llama, vision=vision, compressor="none", voco_token_id=0)
    assert not check_source(source, config)
    graphdef, shapes = abstract_model(config)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    for path, rule, layer, shape in layers_of({"llama": params["llama"]}):
        leaf = params
        for key in path.split("."):
            leaf = leaf[key]
        leaf[... if layer is None else layer] = rule.transform.to_ours(source.tensors[path, layer].read(), shape)
    zeros = np.zeros((1, len(ids)), np.int32)
    read = Read(ids[None], np.arange(len(ids), dtype=np.int32)[None], zeros + 1, zeros - 1)
    return np.asarray(nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))(read, None))[0]


@pytest.mark.parametrize("case", ["linear", "dynamic", "llama3", "yarn", "yarn, attention factor"])
def test_logits_are_transformers(case, tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | CASES[case])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(float(parameter.ndim == 1))
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 50, size=200).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids[None], dtype=torch.long)).logits[0].numpy()
        plain = LlamaRotaryEmbedding(transformers.LlamaConfig(**SMALL))
        model.model.rotary_emb = plain
        unscaled = model(torch.tensor(ids[None], dtype=torch.long)).logits[0].numpy()
    np.testing.assert_allclose(our_logits(tmp_path, ids), expected, atol=2e-4, rtol=0)
    assert case == "dynamic" or np.abs(expected - unscaled).max() > 0.1


def test_two_streams_with_yarn_are_one_sequence(monkeypatch):
    """Slots' keys are kept before rotation and rotated where they are read: the one masked sequence all the same."""
    scaling = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    config = dataclasses.replace(
        CONFIG, num_voco_tokens=2, llama=dataclasses.replace(CONFIG.llama, rope_scaling=scaling)
    )
    fields = SMALL | {"head_dim": 8, "rope_scaling": YARN | {"original_max_position_embeddings": 16}}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**fields))
    frequencies, stretch = jnp.asarray(theirs.inv_freq.numpy()), theirs.attention_scaling
    assert stretch > 1.1

    def rotate(x, positions, theta):
        half = x.shape[-1] // 2
        z = stretch * (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * positions[:, None] * frequencies)[:, None]
        return jnp.concatenate([z.real, z.imag], -1)

    monkeypatch.setattr(oracle, "rotate", rotate)
    graphdef, params = make(config)
    rng = np.random.default_rng(1)
    layout = random_layout(rng, config, numbering="released")
    features = jnp.array(rng.normal(size=(IMAGES, PATCHES, 32)), jnp.float32)
    ours = jax.jit(lambda params, features, read: nnx.merge(graphdef, params).forward(read, features[None])[0])
    oracles = jax.jit(lambda params, features, sequence: oracle.logits(params, config, sequence, features))
    logits = ours(params, features, layout.read)
    for sequence, places in zip(layout.sequences, layout.text_places, strict=True):
        expected = oracles(params, features, sequence.padded(SEQUENCE_LENGTH))
        np.testing.assert_allclose(logits[places], expected[np.flatnonzero(sequence.segment < 0)], atol=2e-5, rtol=2e-5)


def test_head_and_scaling_that_cannot_be():
    for wrong, message in ({"rope_type": "longer"}, "rope_type: expected one of linear"), ({"factor": 0.0}, "above 0"):
        with pytest.raises(ValueError, match=message):
            LlamaConfig(rope_scaling=RopeScaling(**wrong))
