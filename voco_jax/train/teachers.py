"""The teacher of the loss 'distillation', where it is another model than the one that trains: a frozen run, spread over
the same mesh, or the running mean of the trained parameters (`ema.py`)."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.run import for_use
from voco_jax.config import load_config, value_of
from voco_jax.config_keys import OWN_TEACHERS
from voco_jax.data.from_config import make_encoder, make_model_config, reads_whole
from voco_jax.data.teaching import TeacherFormat
from voco_jax.data.tokenizer import load_run_tokenizer
from voco_jax.errors import UserError
from voco_jax.io.paths import as_path
from voco_jax.models.build import abstract_model
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.models.voco import VoCoConfig, VoCoLlama
from voco_jax.parallel.sharding import param_shardings, with_shardings
from voco_jax.train.ema import ema_of
from voco_jax.train.trainable import TrainableFilter

KEY = "config.train.distill.teacher"

# (parameters, optimizer's state, parameters of a frozen run) to the model that teaches; None where the loss needs none
TeacherOf = Callable[[dict, Any, Any], VoCoLlama | None]


def no_teacher(params: dict, opt_state: Any, teacher_params: Any) -> None:
    """Of a loss that needs none."""


def ema_teacher(graphdef: nnx.GraphDef, trainable: TrainableFilter) -> TeacherOf:
    """The model that trains, with the running mean of what trains of it."""
    return lambda params, opt_state, _: nnx.merge(
        graphdef, trainable.merge(ema_of(opt_state), trainable.split(params)[1])
    )


class FoundTeacher(NamedTuple):
    """A run that is to teach, by its files. by_rows: it reads rows of its own, because its prompt is another than the
    student's; else it reads the student's rows whole."""

    name: str  # as the config has it
    config: ConfigDict
    tokenizer: Any
    model_config: VoCoConfig
    by_rows: bool

    def form(self, images_per_row: int) -> TeacherFormat | None:
        """Of the rows of its own that it reads, where it does."""
        if not self.by_rows:
            return None
        return TeacherFormat(make_encoder(self.config, self.tokenizer, self.model_config), images_per_row)


@dataclasses.dataclass(frozen=True)
class TeacherRun:
    """A run that teaches: its model, computed as the student's is, and its parameters as shapes with their places."""

    name: str
    model_config: VoCoConfig
    graphdef: Any
    params: dict
    by_rows: bool

    def teacher_of(self, params: dict, opt_state: Any, teacher_params: Any) -> VoCoLlama:
        """A `TeacherOf`."""
        return nnx.merge(self.graphdef, teacher_params)


# ---- What can be found wrong before anything is written -------------------------------------------------------------


def find_teacher(config: ConfigDict) -> FoundTeacher | None:
    """The run that `train.distill.teacher` names; None where none teaches. Its parameters are not read.

    UserError for a run that cannot teach: that was trained on other pixels, or that cannot read images whole.
    """
    name = run_of(config)
    if not name:
        return None
    directory = as_path(name)
    try:
        stored = load_config(directory / "config.json")
    except UserError as error:
        raise UserError(f"{KEY}: expected {', '.join(map(repr, OWN_TEACHERS))} or a run's directory: {error}") from None
    tokenizer = load_run_tokenizer(directory)
    _check_pixels(name, config, stored)
    model = make_model_config(stored, tokenizer)
    by_rows = not reads_whole(config, stored)
    if not model.compressor_class.has_voco_tokens:
        kinds = " or ".join(repr(kind) for kind in COMPRESSORS if COMPRESSORS[kind].has_voco_tokens)
        expected = f"expected a run that can read images whole (compressor {kinds})"
        raise UserError(f"{KEY}: {expected}; {name} has {model.compressor!r}")
    if by_rows and model.compress_length:
        found = f"{name} compresses, and its prompts are others (config.data.template {stored.data.template!r})"
        raise UserError(
            f"{KEY}: expected LLaVA, or a run with the prompts of this one, which it then reads whole; {found}"
        )
    return FoundTeacher(name, stored, tokenizer, model, by_rows)


def run_of(config: ConfigDict) -> str:
    """The run directory that teaches by a config; '' where none does."""
    name = config.train.distill.teacher
    return "" if config.train.loss != "distillation" or name in OWN_TEACHERS else name


def place_teacher(found: FoundTeacher, student: VoCoConfig, tokenizer, mesh: Mesh) -> TeacherRun:
    """A teacher of a student, over the student's mesh. UserError for one of another tokenizer than the data's, or with
    dimensions that the mesh does not divide."""
    _check_vocabulary(found.name, tokenizer.get_vocab(), found.tokenizer.get_vocab())
    return abstract_teacher(found.name, found.model_config, student, mesh, found.by_rows)


def abstract_teacher(name: str, teacher: VoCoConfig, student: VoCoConfig, mesh: Mesh, by_rows: bool) -> TeacherRun:
    """A teacher by its model."""
    if not by_rows and not teacher.compress_length:
        # Trained uncompressed: the same parameters, with a compress stream, whose segments are the images' prompt
        teacher = dataclasses.replace(teacher, compressor="voco")
    computed = {key: getattr(student, key) for key in ("dtype", "attention", "unroll_layers")}
    teacher = dataclasses.replace(teacher, **computed, remat="none")
    graphdef, params = abstract_model(teacher)
    params = for_use(params, teacher.dtype)
    try:
        params = with_shardings(params, param_shardings(mesh, params, for_use=True))
    except UserError as error:
        raise UserError(f"{KEY}: {name} over this mesh: {error}") from None
    return TeacherRun(name, teacher, graphdef, params, by_rows)


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
    of_processor = (f"data.processor.{key}" for key in config.data.processor)
    for key in ("model.vision.image_size", "data.aspect_ratio", "data.transparency", *of_processor):
        ours, theirs = value_of(config, key), value_of(stored, key)
        if ours != theirs:
            raise UserError(f"{KEY}: expected a run of the same pixels; {name} has {key} {theirs!r}, not {ours!r}")


# ---- Its parameters, and the note of which they were ----------------------------------------------------------------


def load_teacher(teacher: TeacherRun, recorded: dict | None = None) -> tuple[dict, dict]:
    """(parameters, note) of the newest checkpoint, or the one that a note says. All processes call it together.

    The note (`TEACHER` in the directory of the run that is taught) has the run, the step, and a checksum of all
    parameters. UserError where the step of `recorded` has other parameters than they were.
    """
    with contextlib.closing(Checkpointer(as_path(teacher.name))) as checkpointer:
        restored = checkpointer.restore_params(teacher.params, None if recorded is None else recorded["step"])
    sums = json.dumps(sorted(restored.checksums.items()))
    note = {"run": teacher.name, "step": restored.step, "sha256": hashlib.sha256(sums.encode()).hexdigest()}
    if recorded is not None and note["sha256"] != recorded["sha256"]:
        was = f"step {recorded['step']} of {recorded['run']}"
        raise UserError(
            f"{KEY}: this run was taught by {was}, and that of {teacher.name} is another; take another --config.workdir"
        )
    return restored.params, note
