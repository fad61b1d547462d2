"""What the keys of `train.distill` cannot ask for, each in one line: what nothing would honour is not accepted."""

from typing import Any

from voco_jax.config_keys import OWN_TEACHERS, DistillConfig, TrainConfig
from voco_jax.data.pipeline import PackLoader
from voco_jax.errors import UserError
from voco_jax.models.voco import VoCoConfig
from voco_jax.train.distillation import has_divergence
from voco_jax.train.teachers import TeacherRun


def check_keys(train: TrainConfig) -> None:
    """UserError for keys of `train.distill` that do not fit together, or that nothing would read."""
    d, default = train.distill, DistillConfig()
    if train.loss != "distillation":
        for name, value in vars(default).items():
            _expect(name, d, getattr(d, name) == value, value, f"train.loss = {train.loss!r}; 'distillation' reads it")
        return
    if bool(d.teacher) == bool(d.logits):
        found = f"teacher {d.teacher!r} and logits {d.logits!r}" if d.teacher else "neither"
        expected = "expected a teacher ('self', 'ema', 'prefix' or a run's directory), or stored logits"
        raise UserError(f"config.train.distill: {expected}; found {found}")
    if not (has_divergence(d) or d.beta or d.attention or d.whole_weight):
        raise UserError("config.train.distill.alpha: expected above 0, or beta, attention or whole_weight; found none")
    teacher = f"teacher {d.teacher!r}" if d.teacher else "stored logits"
    whole = bool(d.teacher) and d.teacher != "prefix"  # or by rows: see check_models
    for name in ("temperature", "top_k"):
        _expect(
            name, d, has_divergence(d) or getattr(d, name) == getattr(default, name), getattr(default, name), "alpha 0"
        )
    _expect("whole_weight", d, d.teacher in ("self", "ema") or not d.whole_weight, 0, teacher)
    _expect("ema_decay", d, d.teacher == "ema" or d.ema_decay == default.ema_decay, default.ema_decay, teacher)
    for name in ("beta", "attention", "images_per_row"):
        _expect(name, d, whole or not getattr(d, name), 0, f"{teacher}, which does not read images whole")
    for name, layers in (("beta", "layers"), ("attention", "attention_layers")):
        if bool(getattr(d, name)) != bool(getattr(d, layers)):
            expected = "some layers" if getattr(d, name) else "()"
            _expect(layers, d, False, expected, f"{name} {getattr(d, name):g}")
    if not train.compress_gradients:
        for name in ("beta", "attention", "whole_weight"):
            _expect(
                name, d, not getattr(d, name), 0, "train.compress_gradients = False: it would go through that stream"
            )
    if d.teacher == "prefix" and len(train.elastic_k) < 2:
        expected = "expected several numbers of VoCo tokens, with train.distill.teacher 'prefix'"
        raise UserError(f"config.train.elastic_k: {expected}; found {train.elastic_k!r}")


def check_models(d: DistillConfig, student: VoCoConfig, teacher: TeacherRun | None) -> None:
    """UserError for what these models cannot do; `check_keys` has seen the keys."""
    if d.teacher in OWN_TEACHERS and not student.compress_length:
        expected = f"expected a run's directory with compressor {student.compressor!r}, which has no compress stream"
        raise UserError(f"config.train.distill.teacher: {expected}; found {d.teacher!r}")
    num_layers = student.llama.num_hidden_layers
    for name, most, why in (
        ("layers", num_layers, ""),
        ("attention_layers", num_layers - 1, ": the last compresses nothing"),
    ):
        for layer in getattr(d, name):
            expected = f"numbers from 0 to {most - 1} (of {num_layers} layers{why})"
            _expect(name, d, 0 <= layer < most, expected)
    if teacher is None:
        return
    by = f"the teacher {d.teacher}"
    if teacher.by_rows:
        _expect("attention", d, not d.attention, 0, f"{by}, whose prompt is another: it reads rows of its own")
    theirs = teacher.model_config
    same = {"beta": ("hidden_size", "num_hidden_layers"), "attention": ("num_hidden_layers",)}
    for name, fields in same.items():
        for field in fields:
            ours, other = getattr(student.llama, field), getattr(theirs.llama, field)
            _expect(
                name, d, not getattr(d, name) or ours == other, 0, f"{by}: model.llama.{field} {other}, here {ours}"
            )
    ours, other = student.vision.num_features, theirs.vision.num_features
    _expect("attention", d, not d.attention or ours == other, 0, f"{by}: {other} patches an image, here {ours}")


def check_lengths(
    d: DistillConfig, student: VoCoConfig, teacher: TeacherRun | None, data: PackLoader, images_per_row: int
) -> None:
    """UserError where what is read whole, or a teacher's own rows, is longer than its model can read."""
    by = student if teacher is None else teacher.model_config
    if teacher is not None and teacher.by_rows:
        rows: Any = data.teaching
        longest, row_length, whole = rows.longest, rows.row_length, 0
    elif d.teacher in ("self", "ema") or teacher is not None:
        more = by.compress_length - student.num_voco_tokens
        longest, row_length = data.plan.longest_whole(more, images_per_row), data.plan.shape.row_length
        whole = images_per_row
        if not longest:
            expected = f"expected conversations about 1 to {images_per_row} images, to be read whole"
            raise UserError(f"config.train.distill.teacher: {d.teacher!r}: {expected}; found none")
    else:
        return
    limit, name = by.llama.max_position_embeddings, f"the teacher {d.teacher!r}"
    if longest > limit:
        raise UserError(
            f"config.train.distill.teacher: {name} has room for {limit} tokens (max_position_embeddings), and a "
            f"conversation with its images whole has {longest}"
        )
    try:
        by.check_kernels(row_length, training=teacher is None, whole_images=whole)
    except ValueError as error:
        raise UserError(f"config.train.distill.teacher: {name}: {error}") from None


def _expect(name: str, distill: DistillConfig, is_so: bool, expected: Any, with_: str = "") -> None:
    if not is_so:
        with_ = f" with {with_}" if with_ else ""
        raise UserError(f"config.train.distill.{name}: expected {expected}{with_}; found {getattr(distill, name)!r}")
