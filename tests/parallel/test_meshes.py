"""A mesh changes where numbers are, not what they are: eight simulated devices against one, without a mesh.

All checks run in one process of their own, which has the devices, one after the other; each is a test here.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
import sys
import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.eight_devices import failures_of, run_checks
from tests.helpers.losses import cross_entropy, label_loss
from tests.models.test_two_streams import CONFIG, IMAGES, make, random_layout
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.config import default_config
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model, init_params
from voco_jax.models.voco import Read
from voco_jax.parallel.mesh import AXES, make_mesh
from voco_jax.parallel.sharding import param_shardings, put_batch
from voco_jax.train.from_config import abstract_state, make_optimizer, train_step_of
from voco_jax.train.state import init_opt_state
from voco_jax.train.step import loss_and_gradients as loss_and_gradients_of
from voco_jax.train.step import split_batch

pytestmark = pytest.mark.multiprocess

RECORDS, ROWS, LENGTH = 8, 16, 128  # two read rows share a record's images
BASE = dataclasses.replace(
    CONFIG,
    llama=dataclasses.replace(CONFIG.llama, num_hidden_layers=2, vocab_multiple=16),  # 50 tokens in 64 rows
    num_voco_tokens=3,
    unroll_layers=True,  # compiles sooner
)
TIED = dataclasses.replace(BASE.llama, tie_word_embeddings=True)
SWITCHES = dict(llama=dataclasses.replace(BASE.llama, qkv_bias=True, qk_norm=True, sliding_window=9))
EMBEDDING = dict(compressor="voco_embedding")
SIGLIP = dict(  # its switches, three selected layers, and a rest of two pixels
    vision=dataclasses.replace(
        BASE.vision, class_token=False, patch_bias=True, pre_layernorm=False, hidden_act="gelu_tanh",
        further_layers=(0, -1), patch_size=3,
    ),
    projector_layers=3,
)  # fmt: skip
RELATIVES = SWITCHES | SIGLIP  # of Llama and CLIP

# Mesh (data, fsdp, frame, tensor), what the model is, and how it is computed (which the one device is not told).
CASES = {
    "data": ((8, 1, 1, 1), {}, {}),
    "fsdp, scanned, remat, relatives": ((2, 4, 1, 1), RELATIVES, dict(unroll_layers=False, remat="full")),
    "tensor, relatives": ((2, 2, 1, 2), RELATIVES, {}),
    "two frame shards, scanned": ((1, 2, 2, 2), {}, dict(unroll_layers=False)),
    "four frame shards": ((2, 1, 4, 1), {}, {}),
    "embeddings, two frame shards, scanned": ((1, 2, 2, 2), EMBEDDING, dict(unroll_layers=False)),
    "uncompressed, tied embeddings": ((1, 2, 2, 2), dict(compressor="none", llama=TIED), {}),
    "embeddings, data": ((8, 1, 1, 1), EMBEDDING, {}),
    "embeddings, fsdp, scanned, remat": ((2, 4, 1, 1), EMBEDDING, dict(unroll_layers=False, remat="full")),
    "embeddings, tensor": ((2, 2, 1, 2), EMBEDDING, {}),
    "embeddings, four frame shards": ((2, 1, 4, 1), EMBEDDING, {}),
}


def mesh_of(shape):
    config = default_config().mesh
    config.update(dict(zip(AXES, shape, strict=True)))
    return make_mesh(config)


def random_batch(config) -> dict:
    """Random packed rows with padding; row 2 has text alone, row 5 nothing at all."""
    rng = np.random.default_rng(0)
    reads = [random_layout(rng, config, "compact").read for _ in range(ROWS)]
    batch = {name: np.concatenate([getattr(read, name) for read in reads]) for name in Read._fields}
    batch = {name: np.pad(x, [(0, 0), (0, LENGTH - x.shape[1])]) for name, x in batch.items()}
    batch["slot_index"][:, reads[0].tokens.shape[1] :] = -1
    text = Sample(rng.integers(4, 49, 9).astype(np.int32), np.ones(9, bool), np.full(9, -1, np.int32), 0)
    for i, samples in (2, [text]), (5, []):
        row = pack_row(samples, LENGTH)
        for name in Read._fields:
            batch[name][i] = getattr(row, name)
    shape = batch["tokens"].shape
    batch["targets"] = rng.integers(0, 50, shape).astype(np.int32)
    batch["weights"] = ((batch["segment_ids"] > 0) & (rng.random(shape) < 0.5)).astype(np.float32)
    batch["pixel_values"] = rng.normal(size=(RECORDS, IMAGES, 8, 8, 3)).astype(np.float32)
    return batch


def loss_and_gradients(config, batch: dict, shape=None):
    """As numpy arrays; on a mesh of that shape, or on one device without."""
    graphdef, params = make(config)
    function = jax.jit(jax.value_and_grad(functools.partial(label_loss, graphdef)))
    if shape is None:
        return jax.device_get(function(params, batch))
    mesh = mesh_of(shape)
    params = jax.device_put(params, param_shardings(mesh, params))
    with jax.set_mesh(mesh):
        return jax.device_get(function(params, put_batch(mesh, batch)))


@functools.cache
def on_one_device(config):
    return loss_and_gradients(config, random_batch(config))


def assert_close(found, expected, tolerance: float):
    """Relative to each array's largest element."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert np.isfinite(x).all(), name
        if "k_proj.bias" in name or "post_layernorm" in name:
            continue  # softmax does not feel a key's constant: nothing but rounding; and what nobody uses
        error = np.abs(x - y).max() / np.abs(y).max()
        assert error <= tolerance, f"{name}: {error:.2e}"


def loss_and_gradients_are_those_of_one_device(case):
    shape, model, computing = CASES[case]
    config = dataclasses.replace(BASE, **model)
    found = loss_and_gradients(dataclasses.replace(config, **computing), random_batch(config), shape)
    assert_close(found, on_one_device(config), 1e-5)


def a_batch_in_pieces_is_the_batch():
    """Four of them, each device's own packs cut up; and they stay where they are."""
    config, mesh = dataclasses.replace(BASE, unroll_layers=False), mesh_of((1, 2, 2, 2))
    graphdef, params = make(config)
    loss_of = functools.partial(cross_entropy, graphdef)
    params = jax.device_put(params, param_shardings(mesh, params))
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, random_batch(config))
        output, gradients = jax.jit(lambda params, batch: loss_and_gradients_of(loss_of, params, batch, 4))(
            params, batch
        )
        found = output.means()["loss"], gradients
        text = jax.jit(lambda batch: split_batch(batch, 4)).lower(batch).compile().as_text()
        with pytest.raises(UserError, match=r"data.batch_size: expected a multiple of 16, the 2 devices along .*; fou"):
            split_batch(batch, 8)
    assert_close(jax.device_get(found), on_one_device(BASE), 1e-5)
    assert "all-to-all" not in text and "all-gather" not in text and "permute" not in text


def splash_on_every_axis_is_xla():
    """Of Qwen's switches; windows it has none."""
    config = dataclasses.replace(BASE, llama=dataclasses.replace(BASE.llama, qkv_bias=True, qk_norm=True, head_dim=12))
    found = loss_and_gradients(dataclasses.replace(config, attention="splash"), random_batch(config), (1, 2, 2, 2))
    assert_close(found, on_one_device(config), 1e-4)


def every_image_is_seen_by_one_device():
    """What a device computes to compress images, the vision tower included, is an eighth."""
    graphdef, params = make(BASE)
    pixels = random_batch(BASE)["pixel_values"]

    def compress(params, pixels):
        model = nnx.merge(graphdef, params)
        return model.compress(model.encode_images(pixels))

    def flops(params, pixels):
        return jax.jit(compress).lower(params, pixels).compile().cost_analysis()["flops"]

    mesh = mesh_of((2, 1, 4, 1))
    alone = flops(params, pixels)
    with jax.set_mesh(mesh):
        share = flops(
            jax.device_put(params, param_shardings(mesh, params)),
            put_batch(mesh, {"pixel_values": pixels})["pixel_values"],
        )
    assert share < 1.05 * alone / 8, (alone, share)


def parameters_are_made_in_their_shards():
    mesh = mesh_of((1, 2, 2, 2))
    shardings = param_shardings(mesh, abstract_model(BASE)[1])
    params = init_params(BASE, 3, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(init_params(BASE, 3)))
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {sharding.shard_shape(leaf.shape)}
    kernel = params["llama"]["layers"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def a_checkpoint_moves_between_meshes():
    config, optimizer = default_config(), make_optimizer(default_config())
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(Checkpointer(Path(directory), create=True)) as checkpointer,
    ):
        state = abstract_state(config, BASE, optimizer, mesh_of((2, 2, 1, 2)))
        params = jax.device_put(make(BASE)[1], state.shardings[0])
        opt_state = init_opt_state(optimizer, params, state)
        checkpointer.save(1, params, opt_state, {"next": 1})
        checkpointer._manager.wait_until_finished()
        state = abstract_state(config, BASE, optimizer, mesh_of((1, 8, 1, 1)))
        _, found, its_opt_state, *_ = checkpointer.restore(1, state.params, state.opt_state)
        for leaf, abstract in zip(jax.tree.leaves((found, its_opt_state)), jax.tree.leaves(state[1:3]), strict=True):
            assert leaf.sharding == abstract.sharding
            assert leaf.addressable_shards[0].data.shape == abstract.sharding.shard_shape(leaf.shape)
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((found, params)))
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((its_opt_state, opt_state)))
        _, found = checkpointer.restore_params(abstract_model(BASE)[1])[:2]
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(found)} == {1}
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((found, params)))


def a_training_step_keeps_what_is_frozen_and_where_things_are():
    """Two steps, buffers given up: the frozen vision tower bit for bit the same, without optimizer state."""
    config, mesh = default_config(), mesh_of((1, 2, 2, 2))
    config.train.freeze = ("vision_tower", "llama.norm")
    config.optim.warmup_steps = 0
    optimizer = make_optimizer(config)
    with jax.set_mesh(mesh):
        state = abstract_state(config, BASE, optimizer, mesh)
        step = train_step_of(config, state, optimizer)
        params = jax.device_put(make(BASE)[1], state.shardings[0])
        before = jax.device_get(params)
        opt_state = init_opt_state(optimizer, params, state)
        for _ in range(2):
            given = params["llama"]["layers"]["q_proj"]["kernel"], *jax.tree.leaves(opt_state)
            params, opt_state, metrics = step(params, opt_state, put_batch(mesh, random_batch(BASE)))
            assert all(leaf.is_deleted() for leaf in given)
        assert sorted(metrics) == ["bad", "grad_norm", "loss"]
        assert all(x.is_fully_replicated and x.dtype == np.float32 and x.shape == () for x in metrics.values())
        assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0 and float(metrics["bad"]) == 0
    assert "vision_tower" not in str(jax.tree.structure(opt_state)) and "projector" in str(
        jax.tree.structure(opt_state)
    )
    for leaf, abstract in zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(state[1:3]), strict=True):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    frozen = ("vision_tower",), ("llama", "norm")
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        keys = tuple(key.key for key in path)
        same = (leaf == functools.reduce(lambda tree, key: tree[key], keys, before)).all()
        assert same == any(keys[: len(part)] == part for part in frozen), keys


def rounding_is_that_of_one_device():
    """Of parameters and moments in bfloat16: what is random follows from places in the whole arrays."""
    config, mesh = default_config(), mesh_of((2, 2, 1, 2))
    config.optim.update(dict(clip_norm=1e9, warmup_steps=0, learning_rate=1e-4))
    kernel = make(BASE)[1]["llama"]["layers"]["q_proj"]["kernel"].astype(jnp.bfloat16)
    params = {"llama": {"layers": {"q_proj": {"kernel": kernel}}}}
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    shardings = param_shardings(mesh, params), param_shardings(mesh, state)

    def step(params, state):
        updates, state = optimizer.update(params, state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    alone, spread = (params, state), jax.device_put((params, state), shardings)
    alone_step, spread_step = jax.jit(step), jax.jit(step, out_shardings=shardings)
    for _ in range(3):
        alone, spread = alone_step(*alone), spread_step(*spread)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((alone, spread)))
    found = spread[0]["llama"]["layers"]["q_proj"]["kernel"]
    assert found.addressable_shards[0].data.size * 4 == found.size and (jax.device_get(found) != kernel).any()


CHECKS = {case: functools.partial(loss_and_gradients_are_those_of_one_device, case) for case in CASES} | {
    check.__name__: check
    for check in (
        a_batch_in_pieces_is_the_batch,
        splash_on_every_axis_is_xla,
        every_image_is_seen_by_one_device,
        parameters_are_made_in_their_shards,
        a_checkpoint_moves_between_meshes,
        a_training_step_keeps_what_is_frozen_and_where_things_are,
        rounding_is_that_of_one_device,
    )
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return failures_of(__name__)


@pytest.mark.parametrize("name", CHECKS)
def test_eight_devices(failures, name):
    assert name not in failures, failures[name]


if __name__ == "__main__":
    run_checks(CHECKS, sys.argv[1:])
