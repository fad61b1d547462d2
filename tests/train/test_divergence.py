"""The fused KL divergence and cross-entropy against both in float64 with all logits: losses and gradients."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.eight_devices import failures_of, run_checks
from tests.parallel.test_meshes import mesh_of
from tests.train.test_label_losses import subjaxprs
from voco_jax.train import label_losses
from voco_jax.train.label_losses import Divergence, Labels, TeacherLabels

ROWS, LENGTH, SIZE, WIDER, VOCAB = 4, 24, 8, 12, 50
ALPHA = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    columns: int = VOCAB  # of the student's head
    teacher_columns: int = VOCAB  # 0: stored logits
    teacher_vocab: int = VOCAB
    temperature: float = 1.0
    top_k: int = 0


CASES = {
    "as it is": Case(),
    "padded student, temperature": Case(columns=64, temperature=2.5),
    "padded teacher": Case(teacher_columns=64),
    "both padded, top k": Case(columns=64, teacher_columns=56, top_k=5, temperature=0.5),
    "teacher with more tokens": Case(teacher_columns=64, teacher_vocab=60),
    "teacher with fewer tokens, top k of all": Case(teacher_columns=48, teacher_vocab=44, top_k=48),
    "stored logits": Case(columns=64, teacher_columns=0, temperature=2.0),
}


def inputs(case: Case, dtype: Any = jnp.float32) -> tuple[Labels, TeacherLabels, int, Divergence]:
    rng = np.random.default_rng(0)
    drawn = rng.random((ROWS, LENGTH))
    weights = (drawn * (drawn < 0.7)).astype(np.float32)
    taught = (weights * (rng.random(weights.shape) < 0.6)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
    hidden = rng.normal(size=(ROWS, LENGTH, SIZE)).astype(dtype)
    labels = Labels(hidden, rng.normal(size=(SIZE, case.columns)).astype(np.float32), targets, weights)
    if case.teacher_columns:
        said: dict = dict(hidden=rng.normal(size=(ROWS, LENGTH, WIDER)).astype(dtype))
        said["head"] = rng.normal(size=(WIDER, case.teacher_columns)).astype(np.float32)
    else:  # of 6 tokens; in places of 4, the rest filled up; where nothing is taught there is nothing
        ids = np.array([[rng.permutation(VOCAB)[:6] for _ in range(LENGTH)] for _ in range(ROWS)])
        logits = np.where((np.arange(6) < 4) | (drawn < 0.3)[..., None], rng.normal(size=ids.shape), -np.inf)
        logits = np.where(taught[..., None] > 0, logits, -np.inf).astype(np.float32)
        said = dict(ids=np.where(np.isfinite(logits), ids, 0).astype(np.int32), logits=logits)
    teaching = TeacherLabels(taught, np.float32(ALPHA), **said)
    return labels, teaching, VOCAB, Divergence(case.temperature, case.top_k, case.teacher_vocab)


def dense_teacher(teaching: TeacherLabels, divergence: Divergence) -> np.ndarray:
    """The teacher's logits of all tokens [R, T, V], float64, -inf for those that it has none for."""
    dense = np.full((*teaching.weights.shape, VOCAB), -np.inf)
    if teaching.hidden is not None:
        both = min(VOCAB, divergence.vocab_size)
        dense[..., :both] = (np.asarray(teaching.hidden, np.float64) @ teaching.head)[..., :both]
        kth = np.sort(dense, axis=-1)[..., -divergence.top_k, None]
        return np.where(dense >= kth, dense, -np.inf) if divergence.top_k else dense
    for place in np.argwhere(teaching.weights > 0):
        some = np.isfinite(teaching.logits[*place])
        dense[*place, teaching.ids[*place][some]] = teaching.logits[*place][some]
    return dense


def oracle(labels: Labels, teaching: TeacherLabels, divergence: Divergence):
    """((total, (cross-entropy, KL)), gradients of hidden and head) in float64, with all logits at once."""
    dense, temperature = dense_teacher(teaching, divergence) / divergence.temperature, divergence.temperature
    at = teaching.weights > 0
    p = np.where(at[..., None], np.exp(dense - dense.max(-1, keepdims=True, initial=-1e9)), 1.0)
    p /= p.sum(-1, keepdims=True)
    with jax.enable_x64():

        def losses(hidden, head):
            log_q = jax.nn.log_softmax((hidden @ head)[..., :VOCAB], axis=-1)
            entropy = -jnp.take_along_axis(log_q, jnp.asarray(labels.targets)[..., None], axis=-1)[..., 0]
            log_q = jax.nn.log_softmax((hidden @ head)[..., :VOCAB] / temperature, axis=-1)
            kl = (p * (np.log(np.where(p > 0, p, 1)) - log_q)).sum(-1)
            weights = labels.weights.astype(np.float64)
            mixed = jnp.where(at, (1 - ALPHA) * entropy + ALPHA * temperature**2 * kl, 0) * teaching.weights
            total = (mixed + entropy * (weights - teaching.weights)).sum()
            return total, ((entropy * weights).sum(), (kl * teaching.weights).sum())

        arrays = (jnp.asarray(x, jnp.float64) for x in (labels.hidden, labels.head))
        return jax.device_get(jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)(*arrays))


def fused(labels: Labels, teaching: TeacherLabels, vocab_size: int, divergence: Divergence):
    """The same of the code, of twice the loss: gradients have to be scaled by what comes from above."""

    @jax.jit
    def computed(hidden, head, labels, teaching):
        def losses(hidden, head):
            found = label_losses.label_losses(
                labels._replace(hidden=hidden, head=head), vocab_size, teaching, divergence
            )
            return 2 * found.total, found[1:]

        return jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)(hidden, head)

    (total, sums), gradients = computed(labels.hidden, labels.head, labels, teaching)
    return jax.device_get(((total / 2, sums), jax.tree.map(lambda g: g / 2, gradients)))


def assert_same(found, expected, tolerance=2e-6):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(monkeypatch, case, chunk):
    monkeypatch.setattr(label_losses, "CHUNK", chunk)
    labels, teaching, vocab_size, divergence = inputs(CASES[case])
    found = fused(labels, teaching, vocab_size, divergence)
    assert_same(found, oracle(labels, teaching, divergence))
    without = jax.jit(label_losses.label_losses, static_argnums=(1, 3))(labels, vocab_size, teaching, divergence)
    np.testing.assert_allclose(without, (found[0][0], *found[0][1]), rtol=1e-6)  # by itself: another program
    assert (found[1][0][labels.weights == 0] == 0).all() and (found[1][1][:, VOCAB:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_a_teacher_that_is_sure_is_a_target(temperature):
    """Where all weight is on one token, by top_k or by a temperature near 0, the KL divergence is a cross-entropy:
    of the student's logits at the same temperature, with that token as the target."""
    labels, teaching, vocab_size, _ = inputs(Case())
    divergence = Divergence(temperature, 1 if temperature == 1 else 0, VOCAB)
    teaching = teaching._replace(weights=labels.weights, alpha=np.float32(1), head=1000 * teaching.head)  # no near ties
    (total, (_, kl)), (d_hidden, _) = fused(labels, teaching, vocab_size, divergence)
    sure = labels._replace(
        targets=dense_teacher(teaching, Divergence(vocab_size=VOCAB)).argmax(-1), hidden=labels.hidden / temperature
    )
    value, gradient = jax.value_and_grad(lambda h: label_losses.label_cross_entropy(h, *sure[1:], vocab_size))(
        sure.hidden
    )
    np.testing.assert_allclose([total, kl], [temperature**2 * value, value], rtol=1e-5)
    np.testing.assert_allclose(d_hidden, temperature * gradient, rtol=1e-4, atol=1e-6 * np.abs(d_hidden).max())


def test_nothing_flows_into_the_teacher():
    labels, teaching, vocab_size, divergence = inputs(Case())

    def total(said):
        return label_losses.label_losses(labels, vocab_size, teaching._replace(**said), divergence).total

    gradients = jax.grad(total)({"hidden": teaching.hidden, "head": teaching.head, "alpha": teaching.alpha})
    assert not any(np.any(gradient) for gradient in gradients.values())


def test_in_bfloat16_the_heads_gradient_keeps_its_own_type():
    case = CASES["both padded, top k"]
    (_, sums), (d_hidden, d_head) = fused(*inputs(case, jnp.bfloat16))
    assert (sums[0].dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    labels, teaching, _, divergence = inputs(case, jnp.bfloat16)
    (_, expected), (_, expected_head) = oracle(labels, teaching, divergence)
    np.testing.assert_allclose(sums, expected, rtol=2e-2)
    assert np.abs(d_head - expected_head).max() < 0.03 * np.abs(expected_head).max()


def test_logits_are_never_whole(monkeypatch):
    """Neither the student's nor the teacher's."""
    monkeypatch.setattr(label_losses, "CHUNK", 8)
    labels, teaching, vocab_size, divergence = inputs(Case(columns=64, teacher_columns=56, top_k=5))

    def total(hidden, head, teaching):
        return label_losses.label_losses(
            labels._replace(hidden=hidden, head=head), vocab_size, teaching, divergence
        ).total

    gradient = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(labels.hidden, labels.head, teaching)
    sizes = {var.aval.size for jaxpr in subjaxprs(gradient.jaxpr) for eqn in jaxpr.eqns for var in eqn.outvars}
    assert {8 * 64, 8 * 56} <= sizes and max(sizes) < ROWS * LENGTH * VOCAB / 2


# ---- Over eight simulated devices ----------------------------------------------------------------------------------

SHAPES = {"fsdp, frame and tensor": (1, 2, 2, 2), "data and fsdp": (2, 2, 1, 2)}


def over_a_mesh(case: str, shape: tuple[int, ...]) -> None:
    arguments = inputs(CASES[case])
    with jax.set_mesh(mesh_of(shape)):
        found = fused(*arguments)
    assert_same(found, oracle(arguments[0], arguments[1], arguments[3]))


CHECKS = {
    f"{case}, {name}": functools.partial(over_a_mesh, case, shape)
    for (name, shape), case in zip(SHAPES.items(), ("both padded, top k", "stored logits"), strict=True)
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
