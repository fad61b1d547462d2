"""The loss 'distillation': a teacher that reads images whole teaches a student that reads their VoCo tokens.

    alpha · temperature² · KL(teacher ‖ student) + (1 - alpha) · cross-entropy      of the answers' tokens
    + beta · (1 - cosine of both hidden states)                                     after chosen layers, at these tokens
    + attention · KL(the teacher's text to patches ‖ the student's VoCo tokens to patches)            in chosen layers
    + whole_weight · cross-entropy of the answers, with images read whole           by the weights that train

The paper states the first (E[KL(p_teacher(y | V, T) ‖ p_student(y | C, T))]); the temperature is Hinton's
(arXiv:1503.02531). A label that nobody teaches has the cross-entropy alone. All terms are sums over labels, so that
pieces of a batch add up. Who teaches:

| `train.distill.teacher` | reads                                                    | parameters                     |
|-------------------------|----------------------------------------------------------|--------------------------------|
| `self`                  | the same rows whole, beside the compress stream          | those that train, as constants |
| `ema`                   | the same rows whole                                      | the running mean of these      |
| a run                   | the same rows whole, or rows of its own (another prompt) | frozen                         |
| `prefix`                | the same rows with all VoCo tokens                       | those that train, as constants |
| (`logits`)              | nothing: the batch has its logits                        |                                |
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from voco_jax.config_keys import DistillConfig
from voco_jax.models.read import Read, whole_places
from voco_jax.models.voco import ReadOutput, VoCoLlama, Whole
from voco_jax.train.label_losses import (
    Divergence,
    LabelLosses,
    Labels,
    TeacherLabels,
    label_cross_entropy,
    label_losses,
)
from voco_jax.train.loss_types import Batch, Loss, LossConfig, LossExtra, LossOutput, constant, hidden_states, read_of

QUERIES = 32  # text tokens of a row, spread evenly over its labels, whose attention to the patches teaches
_LEAST = 1e-20  # of a share of attention, whose logarithm is taken


class _Readings(NamedTuple):
    """What was read of a batch.

    taught: bool [R, T], the tokens of which `teacher` says something. by: the model that read it. whole: what the
    weights that train read whole.
    """

    student: Any  # a ReadOutput, with what the loss asked for
    taught: jax.Array
    teacher: Any = None  # a ReadOutput, or None
    by: Any = None  # a VoCoLlama, or None
    whole: Any = None  # a ReadOutput, or None


def distillation(config: LossConfig) -> Loss:
    """The loss of `train.distill`, whose keys `distillation_checks.py` looks at."""
    distill = config.distill

    def loss(model: VoCoLlama, batch: Batch, extra: LossExtra) -> LossOutput:
        readings, weights = _read(config, model, batch, extra.teacher), batch["weights"]
        taught = jnp.where(readings.taught, weights, 0)
        labels = _label_losses(config, model, batch, readings, taught, extra.step)
        terms = {}  # weight, sum
        if distill.beta and readings.teacher is not None:
            terms["feature"] = distill.beta, _feature_distance(readings, distill.layers, taught)
        if distill.attention and readings.teacher is not None:
            terms["attention"] = distill.attention, _attention_divergence(readings, distill.attention_layers, taught)
        if distill.whole_weight:
            hidden, head = model.llama.norm(readings.whole.hidden), model.llama.head()
            whole = label_cross_entropy(hidden, head, batch["targets"], taught, model.config.llama.vocab_size)
            terms["whole_cross_entropy"] = distill.whole_weight, whole
        of_all, of_taught = weights.sum(), taught.sum()
        metrics = {"cross_entropy": (labels.cross_entropy, of_all), "taught": (of_taught, of_all)}
        if _is_divergent(config, readings, batch):
            metrics["kl"] = labels.kl, of_taught
        metrics |= {name: (value, of_taught) for name, (_, value) in terms.items()}
        return LossOutput(labels.total + sum(weight * value for weight, value in terms.values()), of_all, metrics)

    return loss


def has_divergence(distill: DistillConfig) -> bool:
    """Whether the KL divergence is ever counted."""
    return max(distill.alpha, distill.alpha_end or 0) > 0


def alpha_at(distill: DistillConfig, step: jax.Array | int, steps: int) -> jax.Array:
    """The share of the KL divergence after so many updates: from `alpha` in a line to `alpha_end` at the last step."""
    end = distill.alpha if distill.alpha_end is None else distill.alpha_end
    done = jnp.minimum(jnp.asarray(step, jnp.float32) / max(1, steps - 1), 1)
    return distill.alpha + (end - distill.alpha) * done


# ---- Reading -------------------------------------------------------------------------------------------------------


def _read(config: LossConfig, model: VoCoLlama, batch: Batch, teacher: Any) -> _Readings:
    distill, read, pixels = config.distill, read_of(batch, model.config), batch["pixel_values"]
    if distill.teacher == "prefix":
        return _read_prefix(config, model, batch, read)
    nothing = jnp.zeros(read.tokens.shape, bool)
    if distill.logits or config.by_rows and "teacher_places" not in batch:  # which a test set does not have
        alone = ReadOutput(hidden_states(model, batch, config.compress_gradients))
        return _Readings(alone, batch.get("taught", nothing))
    most, layers, slots = config.images_per_row, bool(distill.beta), model.config.num_voco_tokens
    taught = batch["teacher_places"] >= 0 if config.by_rows else whole_places(read, slots, most)
    queries = _queries(jnp.where(taught, batch["weights"], 0)) if distill.attention else None
    is_read_whole = distill.teacher == "self" or distill.whole_weight > 0
    own = Whole(most, constant=not distill.whole_weight) if is_read_whole else None
    student: Any
    whole: Any = None
    if config.compress_gradients:
        student, whole = model.streams(read, pixels, whole=own, layers=layers, queries=queries)
    else:
        student = ReadOutput(hidden_states(model, batch, compress_gradients=False))
        if own is not None:
            whole = constant(model).streams(read, pixels, compressed=False, whole=own)[1]
    if distill.teacher == "self":
        return _Readings(student, taught, jax.lax.stop_gradient(whole), model, whole)
    if config.by_rows:
        rows = Read(*(batch[f"teacher_{name}"] for name in Read._fields))
        said = _at_places(teacher.streams(rows, pixels, layers=layers)[0], batch["teacher_places"])
    else:
        of_rows = Whole(most, constant=True, slots_per_image=slots)
        said = teacher.streams(read, pixels, compressed=False, whole=of_rows, layers=layers, queries=queries)[1]
    return _Readings(student, taught, jax.lax.stop_gradient(said), teacher, whole)


def _read_prefix(config: LossConfig, model: VoCoLlama, batch: Batch, read: Read) -> _Readings:
    """With fewer VoCo tokens and with all, of images that are compressed once."""
    nothing, pixels = jnp.zeros(read.tokens.shape, bool), batch["pixel_values"]
    if "num_tokens" not in batch or not pixels.shape[1]:  # a test set has all
        return _Readings(ReadOutput(hidden_states(model, batch, config.compress_gradients)), nothing)
    fixed = constant(model)
    compressing = model if config.compress_gradients else fixed
    memory = compressing.compress(compressing.encode_images(pixels))
    all_tokens = Read(*(batch[name] for name in Read._fields))
    fewer = jnp.repeat(batch["num_tokens"], len(read.tokens) // len(pixels)) < model.config.num_voco_tokens
    return _Readings(
        ReadOutput(model.read(read, memory)),
        _of_images(all_tokens) & fewer[:, None],
        ReadOutput(fixed.read(all_tokens, jax.lax.stop_gradient(memory))),
        fixed,
    )


def _of_images(read: Read) -> jax.Array:
    """Bool [R, T]: tokens of conversations with an image."""
    ids, slot_index = jnp.asarray(read.segment_ids), jnp.asarray(read.slot_index)
    T = ids.shape[1]
    found = jax.vmap(lambda is_slot, ids: jax.ops.segment_max(is_slot, ids, T + 1))(slot_index >= 0, ids)
    return jnp.take_along_axis(found, ids, axis=1)


def _at_places(said: Any, places: jax.Array) -> ReadOutput:
    """What a teacher that reads rows of its own [R, T'] says at the tokens of the student's [R, T]."""
    places = jnp.maximum(places, 0)[..., None]
    hidden = jnp.take_along_axis(said.hidden, places, axis=1)
    layers = None if said.layers is None else jnp.take_along_axis(said.layers, places[None], axis=2)
    return ReadOutput(hidden, layers)


def _queries(weights: jax.Array) -> jax.Array:
    """Places [R, Q] of labels of a row, spread evenly over them; -1 where there are fewer."""
    order, count = jnp.argsort(weights == 0, axis=1, stable=True), (weights != 0).sum(1, keepdims=True)
    number = jnp.arange(min(QUERIES, weights.shape[1]))
    which = jnp.where(count > len(number), number * count // len(number), number)
    return jnp.where(number < count, jnp.take_along_axis(order, which, axis=1), -1)


# ---- Terms: sums over labels ---------------------------------------------------------------------------------------


def _label_losses(
    config: LossConfig, model: VoCoLlama, batch: Batch, readings: _Readings, taught: jax.Array, step: jax.Array | int
) -> LabelLosses:
    """Cross-entropy and KL divergence, with the weights of the labels that are taught [R, T]."""
    distill, vocab_size = config.distill, model.config.llama.vocab_size
    student = model.llama.norm(readings.student.hidden)
    labels = Labels(student, model.llama.head(), batch["targets"], batch["weights"])
    if not _is_divergent(config, readings, batch):
        return label_losses(labels, vocab_size)
    alpha, by = alpha_at(distill, step, config.steps), readings.by
    if by is None:
        teaching = TeacherLabels(taught, alpha, ids=batch["teacher_ids"], logits=batch["teacher_logits"])
        return label_losses(labels, vocab_size, teaching, Divergence(distill.temperature))
    teaching = TeacherLabels(taught, alpha, by.llama.norm(readings.teacher.hidden), by.llama.head())
    how = Divergence(distill.temperature, distill.top_k, by.config.llama.vocab_size)
    return label_losses(labels, vocab_size, teaching, how)


def _is_divergent(config: LossConfig, readings: _Readings, batch: Batch) -> bool:
    """Whether there is a KL divergence: a test set may have no teacher."""
    return has_divergence(config.distill) and (readings.teacher is not None or "teacher_ids" in batch)


def _feature_distance(readings: _Readings, layers: tuple[int, ...], taught: jax.Array) -> jax.Array:
    """Sum over labels of 1 - cosine of the hidden states after some layers, their mean."""
    chosen, at = jnp.array(layers), (taught > 0)[..., None]  # elsewhere they may be zero, whose norm has no gradient
    student, teacher = (
        jnp.where(at, x.layers[chosen].astype(jnp.float32), 1) for x in (readings.student, readings.teacher)
    )
    cosine = (student * teacher).sum(-1) / (jnp.linalg.norm(student, axis=-1) * jnp.linalg.norm(teacher, axis=-1))
    return ((1 - cosine).mean(0) * taught).sum()


def _attention_divergence(readings: _Readings, layers: tuple[int, ...], taught: jax.Array) -> jax.Array:
    """KL divergence of where the teacher's text and the student's VoCo tokens look in an image, the mean over layers
    and over a pack's images that text looks at; the sum over packs, each with the weight of its labels."""
    chosen = jnp.array(layers)
    p, q = (x.attention[chosen] for x in (readings.teacher, readings.student))  # [n, B, I, P]
    kl = (p * (jnp.log(jnp.maximum(p, _LEAST)) - jnp.log(jnp.maximum(q, _LEAST)))).sum(-1).mean(0)
    seen = (p[0].sum(-1) > 0).astype(jnp.float32)  # zeros where nobody looks
    of_pack = (kl * seen).sum(1) / jnp.maximum(seen.sum(1), 1)
    return (of_pack * taught.reshape(len(of_pack), -1).sum(1)).sum()
