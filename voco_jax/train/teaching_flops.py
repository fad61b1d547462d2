"""Floating-point operations that a teacher adds to a training step, by the formula of `models/flops.py`."""

from voco_jax.config_keys import DistillConfig
from voco_jax.models.voco import VoCoConfig


def teaching_flops(
    distill: DistillConfig,
    student: VoCoConfig,
    teacher: VoCoConfig | None,
    rows: int,
    length: int,
    images: int,
    images_per_row: int,
    own_length: int = 0,
) -> float:
    """Of a step over read rows [rows, length] and images: what reads them beside the student, forward; and backward,
    where it has a cross-entropy of its own.

    `teacher` is the model of a run; with `own_length` it reads rows of so many tokens, else images whole, of which a
    row has room for `images_per_row`.
    """

    def text(c: VoCoConfig, length: int, before: int = 0) -> float:
        # Half of the row is seen, and all that stands before it
        return c.llama.layers_flops(rows * length, length + 2 * before, c.lora) + c.llama.head_flops(rows * length)

    def encoded(c: VoCoConfig) -> float:
        return c.vision.flops(images) + c.projector_flops(images)

    def whole(c: VoCoConfig) -> float:
        return text(c, length, images_per_row * c.compress_length)

    if distill.logits:
        return 0.0
    if distill.teacher == "prefix":
        return text(student, length)
    if teacher is not None:
        return encoded(teacher) + (
            text(teacher, own_length) if own_length else teacher.compress_flops(images) + whole(teacher)
        )
    own = whole(student) * (3 if distill.whole_weight else 1 if distill.teacher == "self" else 0)
    by_mean = encoded(student) + student.compress_flops(images) + whole(student) if distill.teacher == "ema" else 0.0
    return own + by_mean
