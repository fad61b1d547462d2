"""The teacher of the loss 'distillation', where it is another model than the one that trains: a frozen run, spread over
the same mesh, or the running mean of the trained parameters (`ema.py`)."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import hashlib
import json
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.run import for_use
from voco_jax.config import load_config
from voco_jax.data.from_config import make_model_config, make_processor, reads_whole
from voco_jax.data.tokenizer import load_run_tokenizer
from voco_jax.errors import UserError
from voco_jax.io.paths import AnyPath, as_path
from voco_jax.models.build import abstract_model
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.models.voco import VoCoConfig, VoCoLlama
from voco_jax.parallel.sharding import param_shardings, with_shardings
from voco_jax.train.ema import ema_of
from voco_jax.train.trainable import TrainableFilter

KEY = "config.train.distill.teacher"
OWN = ("self", "ema", "prefix")  # teachers that are the model that trains

# (parameters, optimizer's state, parameters of a frozen run) to the model that teaches; None where the loss needs none
TeacherOf = Callable[[dict, Any, Any], VoCoLlama | None]


def no_teacher(params: dict, opt_state: Any, teacher_params: Any) -> None:
    """Of a loss that needs none."""


def ema_teacher(graphdef: nnx.GraphDef, trainable: TrainableFilter) -> TeacherOf:
    """The model that trains, with the running mean of what trains of it."""
    return lambda params, opt_state, _: nnx.merge(
        graphdef, trainable.merge(ema_of(opt_state), trainable.split(params)[1])
    )


@dataclasses.dataclass(frozen=True)
class TeacherRun:
    """A run that teaches: its model, computed as the student's is, and its parameters as shapes with their places.

    by_rows: it reads rows of its own, because its prompt is another than the student's; else it reads the student's
    rows whole.
    """

    directory: AnyPath
    model_config: VoCoConfig
    graphdef: Any
    params: dict
    by_rows: bool

    def teacher_of(self, params: dict, opt_state: Any, teacher_params: Any) -> VoCoLlama:
        """A `TeacherOf`."""
        return nnx.merge(self.graphdef, teacher_params)


# ---- A run that teaches: what can be found wrong before anything is written -----------------------------------------


def find_teacher(config: ConfigDict, student: VoCoConfig, tokenizer, mesh: Mesh) -> TeacherRun | None:
    """The run that `train.distill.teacher` names, for a student and the tokenizer of its data; None where there is none.
    Its parameters are not read.

    UserError for a run that cannot teach: of another tokenizer, trained on other pixels, without a way to read images
    whole, or with dimensions that the mesh does not divide.
    """
    name = run_of(config)
    if not name:
        return None
    directory = as_path(name)
    try:
        stored = load_config(directory / "config.json")
    except UserError as error:
        raise UserError(f"{KEY}: expected {', '.join(map(repr, OWN))} or a run's directory: {error}") from None
    theirs = load_run_tokenizer(directory)
    _check_vocabulary(name, tokenizer.get_vocab(), theirs.get_vocab())
    _check_pixels(name, config, stored)
    return describe_teacher(config, stored, student, make_model_config(stored, theirs), mesh)


def run_of(config: ConfigDict) -> str:
    """The run directory that teaches by a config; '' where none does."""
    name = config.train.distill.teacher
    return "" if config.train.loss != "distillation" or name in OWN else name


def describe_teacher(
    config: ConfigDict, stored: ConfigDict, student: VoCoConfig, teacher: VoCoConfig, mesh: Mesh
) -> TeacherRun:
    """A teacher by its own config (`stored`) and model, as `find_teacher`."""
    name = run_of(config)
    by_rows = not reads_whole(config, student, stored, teacher)
    if not teacher.compressor_class.has_voco_tokens:
        kinds = " or ".join(repr(name) for name, kind in COMPRESSORS.items() if kind.has_voco_tokens)
        raise UserError(
            f"{KEY}: expected a run that can read images whole (compressor {kinds}); {name} has {teacher.compressor!r}"
        )
    if by_rows and teacher.compress_length:
        expected = (
            "expected a run with the template of this one, in which it reads the same rows whole, or one of LLaVA"
        )
        raise UserError(f"{KEY}: {expected}; {name} has config.data.template {stored.data.template!r}, and VoCo tokens")
    # Its images stand in a compress stream's segments, which a model that was trained uncompressed has as well
    if not by_rows and not teacher.compress_length:
        teacher = dataclasses.replace(teacher, compressor="voco")
    computed = {name: getattr(student, name) for name in ("dtype", "attention", "unroll_layers")}
    teacher = dataclasses.replace(teacher, **computed, remat="none")
    graphdef, params = abstract_model(teacher)
    params = for_use(params, teacher.dtype)
    try:
        params = with_shardings(params, param_shardings(mesh, params, for_use=True))
    except UserError as error:
        raise UserError(f"{KEY}: {name} over this mesh: {error}") from None
    return TeacherRun(as_path(name), teacher, graphdef, params, by_rows)


def _check_vocabulary(name: str, ours: Mapping[str, int], theirs: Mapping[str, int]) -> None:
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        here, there = (f"id {v[differing[0]]}" if differing[0] in v else "no token" for v in (ours, theirs))
        count = f"{len(differing)} tokens differ, the first" if len(differing) > 1 else "a token differs"
        raise UserError(
            f"{KEY}: expected a run of the same tokenizer; of {name} {count}: {differing[0]!r} is {there}, here {here}"
        )


def _check_pixels(name: str, config: ConfigDict, stored: ConfigDict) -> None:
    """UserError unless both make the same pixels of a picture."""
    ours, theirs = (dataclasses.asdict(make_processor(c)) for c in (config, stored))
    for field in ours.keys() - {"max_pixels", "max_side"}:
        if ours[field] != theirs[field]:
            key = (
                "model.vision.image_size"
                if field == "size"
                else f"data.{field}"
                if field in config.data
                else f"data.processor.{field}"
            )
            raise UserError(
                f"{KEY}: expected a run of the same pixels; {name} has {key} {theirs[field]!r}, this one {ours[field]!r}"
            )


# ---- Its parameters, and the note of which they were ----------------------------------------------------------------


def load_teacher(teacher: TeacherRun, recorded: dict | None = None) -> tuple[dict, dict]:
    """(parameters, note) of the newest checkpoint, or the one that a note says. All processes call it together.

    The note (`TEACHER` in the directory of the run that is taught) has the run, the step, and a checksum of all
    parameters. UserError where the step of `recorded` has other parameters than they were.
    """
    with contextlib.closing(Checkpointer(teacher.directory)) as checkpointer:
        restored = checkpointer.restore_params(teacher.params, None if recorded is None else recorded["step"])
    sums = json.dumps(sorted(restored.checksums.items()))
    note = {"run": str(teacher.directory), "step": restored.step, "sha256": hashlib.sha256(sums.encode()).hexdigest()}
    if recorded is not None and note["sha256"] != recorded["sha256"]:
        was = f"step {recorded['step']} of {recorded['run']}"
        raise UserError(
            f"{KEY}: this run was taught by {was}, and that of {teacher.directory} is another; take another "
            "--config.workdir"
        )
    return restored.params, note
