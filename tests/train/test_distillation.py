"""The loss that distils, against a dense account of it: values and gradients, none the teacher's; pieces, meshes."""

import dataclasses
import functools
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.distilling import MOST, SCANNED, TEACHER, dense, make_batch, make_teacher, teacher_rows
from tests.helpers.eight_devices import failures_of, run_checks
from tests.models.test_two_streams import make
from tests.parallel.test_meshes import assert_close, mesh_of
from voco_jax.config_keys import DistillConfig
from voco_jax.models.read import Read, whole_places
from voco_jax.models.voco import Whole
from voco_jax.parallel.sharding import param_shardings, put_batch
from voco_jax.train.ema import ema_of, with_ema
from voco_jax.train.loss_types import LossConfig, LossExtra
from voco_jax.train.losses import make_loss
from voco_jax.train.skip_bad_updates import skip_bad_updates
from voco_jax.train.step import loss_and_gradients, make_train_step
from voco_jax.train.teachers import ema_teacher
from voco_jax.train.trainable import TrainableFilter

STEP, STEPS = 2, 5  # alpha is half-way
ALPHA = dict(alpha=0.2, alpha_end=0.8)
SELF = DistillConfig("self", **ALPHA, temperature=2.0)
EVERYTHING = dataclasses.replace(SELF, whole_weight=0.7, beta=0.5, layers=(1, 0), attention=2.0, attention_layers=(0,))
LLAVA = dataclasses.replace(TEACHER, compressor="none", num_voco_tokens=0)
K = SCANNED.num_voco_tokens

# keys, the teacher's model (None: the student's)
CASES = {
    "self": (SELF, None),
    "self, every term": (EVERYTHING, None),
    "run, read whole": (dataclasses.replace(SELF, teacher="runs/teacher"), TEACHER),
    "run, rows of its own": (dataclasses.replace(SELF, teacher="runs/llava"), LLAVA),
    "ema, every term": (dataclasses.replace(EVERYTHING, teacher="ema"), SCANNED),
    "prefix": (dataclasses.replace(SELF, teacher="prefix"), None),
}


def loss_config(distill: DistillConfig, teacher=None) -> LossConfig:
    return LossConfig("distillation", True, distill, STEPS, MOST, by_rows=teacher == LLAVA)


def arguments(case: str):
    """(loss of (params, batch, teacher's parameters), parameters, batch, teacher's parameters)."""
    distill, teacher = CASES[case]
    graphdef, params = make(SCANNED)
    batch, config = make_batch(SCANNED), loss_config(distill, teacher)
    loss, teacher_graphdef, teacher_params = make_loss(config), None, {}
    if teacher is not None:
        teacher_graphdef, teacher_params = make_teacher(teacher)
    if config.by_rows:
        batch |= teacher_rows(batch, teacher)
    if distill.teacher == "prefix":
        batch["num_tokens"] = np.array([1, 2, 3, 3, 2, 1, 1, 3], np.int32)

    def models(params, teacher_params):
        return nnx.merge(graphdef, params), None if teacher is None else nnx.merge(teacher_graphdef, teacher_params)

    def loss_of(params, batch, teacher_params):
        model, by = models(params, teacher_params)
        return loss(model, batch, LossExtra(jnp.int32(STEP), by))

    def dense_of(params, batch, teacher_params):
        model, by = models(params, teacher_params)
        return dense(distill, 0.5, model, batch, by, config.by_rows)

    return loss_of, dense_of, params, batch, teacher_params


IN_ALL_RUNS = ("self, every term", "run, rows of its own")  # of the tests; the others are slow


def slow_unless(fast, cases=CASES) -> list:
    return [pytest.param(case, marks=[] if case in fast else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", slow_unless(IN_ALL_RUNS))
def test_values_and_gradients(case):
    """And exactly nothing of the gradient is the teacher's, whose parameters matter."""
    loss_of, dense_of, params, batch, teacher_params = arguments(case)

    @jax.jit
    def computed(params, batch, teacher_params):
        def found(params, teacher_params):
            output = loss_of(params, batch, teacher_params)
            return output.sum, output

        expected = jax.value_and_grad(lambda params: dense_of(params, batch, teacher_params), has_aux=True)(params)
        return jax.value_and_grad(found, argnums=(0, 1), has_aux=True)(params, teacher_params), expected

    ((total, output), (gradients, of_teacher)), ((expected, sums), expected_gradients) = jax.device_get(
        computed(params, batch, teacher_params)
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert output.metrics.keys() == sums.keys() and output.weight == pytest.approx(batch["weights"].sum())
    for name, value in sums.items():
        np.testing.assert_allclose(output.metrics[name][0], value, rtol=1e-4, err_msg=name)
    assert 0 < sums["taught"] < output.weight and sums["kl"] > 0
    assert_close(gradients, expected_gradients, 5e-5)
    assert not any(np.any(gradient) for gradient in jax.tree.leaves(of_teacher))


def test_weights_that_teach_themselves_are_constants():
    """The gradient is that with a frozen copy of them as the teacher."""
    (loss_of, _, params, batch, _), distill = arguments("self"), dataclasses.replace(SELF, teacher="runs/copy")
    graphdef, loss = make(SCANNED)[0], make_loss(loss_config(distill))

    @jax.jit
    def computed(params, batch, copy):
        def by_copy(params):
            return loss(nnx.merge(graphdef, params), batch, LossExtra(jnp.int32(STEP), nnx.merge(graphdef, copy))).sum

        return jax.grad(lambda params: loss_of(params, batch, {}).sum)(params), jax.grad(by_copy)(params)

    found, expected = jax.device_get(computed(params, batch, jax.tree.map(jnp.copy, params)))
    assert_close(found, expected, 1e-6)


@pytest.mark.slow
def test_stored_logits_teach_what_the_teacher_would():
    """All tokens of the vocabulary stored, at the labels that are taught; where none is, there is nothing."""
    loss_of, _, params, batch, teacher_params = arguments("run, read whole")
    distill = DistillConfig(logits="logits", **ALPHA, temperature=2.0)
    graphdef, loss = make(SCANNED)[0], make_loss(loss_config(distill))
    teacher = nnx.merge(make_teacher(TEACHER)[0], teacher_params)
    read = Read(*(jnp.asarray(batch[name]) for name in Read._fields))
    whole = Whole(MOST, slots_per_image=K)
    said = teacher.streams(read, batch["pixel_values"], compressed=False, whole=whole)[1]
    taught = np.asarray(whole_places(read, K, MOST))
    logits = np.where(taught[..., None], teacher.llama.logits(said.hidden), -np.inf)
    ids = np.broadcast_to(np.arange(logits.shape[-1], dtype=np.int32), logits.shape)
    stored = batch | {"teacher_ids": ids, "teacher_logits": logits, "taught": taught}

    @jax.jit
    def computed(params):
        found = loss(nnx.merge(graphdef, params), stored, LossExtra(jnp.int32(STEP)))
        return found, loss_of(params, batch, teacher_params)

    found, expected = jax.device_get(computed(params))
    assert found.metrics.keys() == expected.metrics.keys()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


@pytest.mark.slow
def test_a_test_set_without_a_teacher_has_the_cross_entropy():
    graphdef, params = make(SCANNED)
    plain, batch = make_loss(LossConfig()), make_batch(SCANNED)
    model = nnx.merge(graphdef, params)
    expected = plain(model, batch, LossExtra())
    for config in (
        loss_config(DistillConfig(logits="logits")),
        loss_config(CASES["prefix"][0]),
        loss_config(dataclasses.replace(CASES["run, rows of its own"][0], beta=1.0, layers=(0,)), LLAVA),
    ):
        found = make_loss(config)(model, batch, LossExtra())
        np.testing.assert_allclose(found.sum, expected.sum, rtol=1e-6)
        assert found.metrics.keys() == {"cross_entropy", "taught"} and found.metrics["taught"][0] == 0


@pytest.mark.parametrize("case", slow_unless(["self, every term"], ["self, every term", "prefix"]))
def test_pieces_are_the_batch(case):
    loss_of, _, params, batch, _ = arguments(case)
    whole, pieces = (
        jax.device_get(
            jax.jit(lambda p, b, n=n: loss_and_gradients(lambda p, b: loss_of(p, b, {}), p, b, n))(params, batch)
        )
        for n in (1, 4)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), pieces[0], whole[0])
    assert_close(pieces[1], whole[1], 2e-5)


# ---- The running mean ----------------------------------------------------------------------------------------------


def test_the_running_mean_of_what_trains():
    """Two steps: the mean of the parameters after each, from the first ones on; it is what teaches."""
    graphdef, params = make(SCANNED)
    trainable = TrainableFilter(("vision_tower", "llama.embed_tokens"), SCANNED.voco_token_id)
    optimizer = skip_bad_updates(with_ema(optax.sgd(0.5), 0.75))
    loss = make_loss(loss_config(dataclasses.replace(SELF, teacher="ema")))
    step = make_train_step(graphdef, loss, optimizer, trainable, teacher_of=ema_teacher(graphdef, trainable))
    state, mean, batch = jax.jit(optimizer.init)(trainable.split(params)[0]), None, make_batch(SCANNED)
    kept = [jax.device_get(trainable.split(params)[0])]
    params = jax.tree.map(jnp.copy, params)
    for _ in range(2):
        params, state, metrics = step(params, state, batch)
        kept.append(jax.device_get(trainable.split(params)[0]))
    mean = jax.tree.map(lambda a, b, c: 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c, *kept)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), ema_of(state), mean)
    assert metrics["kl"] > 0 and "vision_tower" not in mean and mean["llama"]["embed_tokens"].keys() == {"voco_row"}


def test_a_skipped_step_leaves_the_running_mean():
    optimizer = skip_bad_updates(with_ema(optax.sgd(0.5), 0.75), "skip")
    params = {"kernel": jnp.arange(3.0)}
    state = optimizer.init(params)
    _, after = optimizer.update({"kernel": jnp.full(3, jnp.nan)}, state, params, value=1.0)
    assert (ema_of(after)["kernel"] == ema_of(state)["kernel"]).all() and after.good_steps == 0
    assert ema_of(state)["kernel"].dtype == jnp.float32 and ema_of(state)["kernel"] is not params["kernel"]


# ---- Over eight simulated devices ----------------------------------------------------------------------------------


def on_a_mesh_as_on_one_device(case: str, shape: tuple[int, ...]) -> None:
    loss_of, _, params, batch, teacher_params = arguments(case)

    @jax.jit
    def computed(params, batch, teacher_params):
        return loss_and_gradients(lambda p, b: loss_of(p, b, teacher_params), params, batch)

    expected = jax.device_get(computed(params, batch, teacher_params))
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        params, teacher_params = (
            jax.device_put(x, param_shardings(mesh, x, for_use=True)) for x in (params, teacher_params)
        )
        output, gradients = jax.device_get(computed(params, put_batch(mesh, batch), teacher_params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=5e-5), output, expected[0])
    assert_close(gradients, expected[1], 5e-5)


CHECKS = {
    f"{case}, {shape}": functools.partial(on_a_mesh_as_on_one_device, case, shape)
    for case, shape in (
        ("self, every term", (1, 2, 2, 2)),
        ("run, rows of its own", (2, 2, 1, 2)),
        ("run, read whole", (1, 4, 1, 2)),
    )
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return failures_of(__name__)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", CHECKS)
def test_eight_devices(failures, name):
    assert name not in failures, failures[name]


if __name__ == "__main__":
    run_checks(CHECKS, sys.argv[1:])
