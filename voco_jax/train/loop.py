"""The trainer, from top to bottom: config, data, model, loss, step, loop."""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import json
import sys
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import optax

from voco_jax.attention import interpreted
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.init_from import begin_with_run, inherited_prompt, other_pixels
from voco_jax.checkpoint.resume import BASE, TEACHER, base_of, continued, kept_values
from voco_jax.checkpoint.run_files import VERSIONS
from voco_jax.checkpoint.workdir import Workdir, check_workdir, checkpointed_steps, open_workdir, workdir_path
from voco_jax.config import check_config, sources_to_score, typed
from voco_jax.config_keys import EvalConfig, OptimConfig, TrainConfig
from voco_jax.data.pipeline import Batches
from voco_jax.data.sources import open_sources
from voco_jax.data.training_data import open_test_data, open_training_data
from voco_jax.errors import UserError
from voco_jax.interrupts import set_interrupt_line
from voco_jax.io.atomic import write_text
from voco_jax.io.json_files import read_object
from voco_jax.io.paths import AnyPath, as_path, bucket_errors
from voco_jax.models.config import model_error
from voco_jax.models.flops import training_flops
from voco_jax.models.voco import VoCoConfig
from voco_jax.optim import learning_rates
from voco_jax.parallel.compilation_cache import use_compilation_cache
from voco_jax.parallel.distributed import check_same, together
from voco_jax.parallel.mesh import find_devices, make_mesh
from voco_jax.parallel.peaks import peak_flops
from voco_jax.parallel.sharding import batch_shardings, local_rows, put_batch, whole_shapes, with_shardings
from voco_jax.progress import interrupted
from voco_jax.terminal import log as log_to_stderr
from voco_jax.terminal import printable
from voco_jax.train.actions import Action, StepDone
from voco_jax.train.distillation_checks import check_lengths, check_models
from voco_jax.train.evaluation import Evaluator
from voco_jax.train.from_config import abstract_state, loss_of, make_optimizer, teacher_maker, train_step_of
from voco_jax.train.goodput import Goodput, summary
from voco_jax.train.load_initial_params import load_initial_params
from voco_jax.train.metrics import MetricsLog, Speed
from voco_jax.train.periodic import Evaluate, SaveCheckpoint
from voco_jax.train.preemption import Preempted, Preemption
from voco_jax.train.profile import Profiler
from voco_jax.train.rounding import lost_updates
from voco_jax.train.state import AbstractState, init_opt_state
from voco_jax.train.teachers import TeacherRun, find_teacher, load_teacher, place_teacher
from voco_jax.train.teaching_flops import teaching_flops
from voco_jax.train.writers import Writer, check_wandb, open_writers


class _Setup(NamedTuple):
    """What can be made, and found wrong, before a directory is written."""

    config: ConfigDict
    workdir: AnyPath
    resuming: bool
    mesh: Mesh
    tokenizer: Any
    model_config: VoCoConfig
    batches: Batches
    optimizer: optax.GradientTransformation
    state: AbstractState
    train_step: Callable
    evaluator: Evaluator | None
    teacher: TeacherRun | None


def train(config: ConfigDict) -> AnyPath:
    """Train as the config says, from the run's newest checkpoint if there is one; returns the run directory.

    Several processes (`voco_jax/parallel/distributed.py`) call it together.
    """
    begun = time.monotonic()
    find_devices()
    use_compilation_cache(config.compilation_cache)
    with together():  # so nothing in it waits for other processes
        run = _set_up(config)
    vocabulary = sorted(run.tokenizer.get_vocab().items())
    data = run.batches.get_state()
    test = None if run.evaluator is None else run.evaluator.fingerprint()
    check_same(
        {
            "config": run.config, "contents of the workdir": run.resuming, "tokenizer": vocabulary,
            "data files": data["plan"], "stored logits": data.get("teaching"), "test data": test,
        }
    )  # fmt: skip
    with jax.set_mesh(run.mesh):
        _train(run, begun)
    return run.workdir


def _set_up(config: ConfigDict) -> _Setup:
    check_config(config)  # which may come from Python, unchecked
    # Config: a run that goes on keeps its own values where the config does not ask for others
    workdir = workdir_path(config.workdir)
    asked, config = config, continued(config, workdir) if checkpointed_steps(workdir) else begin_with_run(config)
    config = config.copy_and_resolve_references()
    config.data.test = sources_to_score(config.data)
    resuming = check_workdir(workdir, config)
    if note := kept_values(asked, config, workdir) if resuming else other_pixels(config.init_from, config.data):
        log(note)
    if note := inherited_prompt(asked, config):
        log(note)
    mesh = make_mesh(config.mesh)
    # Whatever can be wrong with these shows itself before data is read, which may take minutes
    optimizer = make_optimizer(config)
    loss_of(config)
    _check_best(typed(config).eval, typed(config).train)
    check_wandb(config.train.wandb)

    # Data: every process loads the rows of its own devices
    shard = local_rows(mesh, config.data.batch_size)
    found = find_teacher(config)
    tokenizer, model_config, batches, longest = open_training_data(
        config, run=workdir if resuming else None, shard=shard, log=log,
        teacher=found and found.form(config.train.distill.images_per_row),
    )  # fmt: skip
    config.data.rows_per_pack = batches.loader.plan.shape.rows
    if config.data.test and not config.eval.every:
        open_sources(typed(config).data, "test")  # a wrong name should not show itself after training
    _check_lengths(longest, batches.loader.plan.shape.row_length, model_config)

    # Model and step, as shapes with their places on the mesh
    with jax.set_mesh(mesh):
        state = abstract_state(config, model_config, optimizer, mesh)
        teacher = found and place_teacher(found, model_config, tokenizer, mesh)
        check_models(typed(config).train.distill, model_config, teacher)
        images_per_row = config.train.distill.images_per_row or batches.loader.plan.most_images_in_a_row()
        check_lengths(typed(config).train.distill, model_config, teacher, batches.loader, images_per_row)
        loss = loss_of(config, teacher, images_per_row)
        train_step = train_step_of(config, state, optimizer, teacher, images_per_row)
        _describe_model(typed(config).optim, model_config, state)
        if teacher is not None:
            _describe_teacher(teacher)
        if not resuming:  # before there is a directory
            _try_first_batch(batches, train_step, state, teacher)
    evaluator = None
    if config.eval.every:
        test = open_test_data(config, batches, log)
        evaluator = Evaluator(
            typed(config).eval, test, state.graphdef, state.params, loss, mesh, log,
            teacher_maker(config, state, teacher),
        )  # fmt: skip
    return _Setup(
        config, workdir, resuming, mesh, tokenizer, model_config, batches, optimizer, state, train_step, evaluator,
        teacher,
    )  # fmt: skip


def _train(run: _Setup, begun: float) -> None:
    config, batches, first = run.config, run.batches, jax.process_index() == 0
    teacher_params, note = _load_teacher(run)
    with (
        Preemption() as preemption,
        open_workdir(run.workdir, config, run.tokenizer) as workdir,
        contextlib.closing(Checkpointer(run.workdir, create=True, config=config)) as checkpointer,
        contextlib.closing(batches),
    ):
        if note is not None and not run.resuming:
            _write_note(run.workdir / TEACHER, note)
        start, params, opt_state = _begin(run, checkpointer)
        if run.resuming:
            workdir.save_config(config)
        steps = range(start + 1, config.train.steps + 1)
        if not steps:
            return
        dispatched = start
        set_interrupt_line(
            lambda: interrupted(str(run.workdir), max(checkpointer.steps(), default=0), dispatched, sys.argv[1:])
        )
        with (
            Goodput(workdir.logs / "goodput.json" if first else None, start, since=begun) as goodput,
            _actions(run, steps, workdir, checkpointer, goodput, teacher_params) as actions,
            goodput.during("steps"),
        ):
            feed = _feed(run.mesh, batches, len(steps))
            for step in steps:
                with goodput.during("data"):
                    batch = next(feed)
                with goodput.during("compile" if step == steps.start else "steps"):
                    for action in actions:
                        action.before_step(step)
                    params, opt_state, metrics = run.train_step(params, opt_state, batch, teacher_params)
                    dispatched = step
                    if step == steps.start:
                        preemption.begin()  # not before: compiling may take minutes, and there is nothing to save
                        jax.block_until_ready(metrics)  # counts as compiling, not as a measure of the steps to come
                preempted = preemption.reached(step)
                last = preempted or step == steps[-1]
                done = StepDone(step, metrics, params, opt_state, last, preempted)
                for action in actions:
                    action.after_step(done)
                if last:
                    break
        log(summary(goodput.seconds))
        if step != steps[-1]:
            log(f"{run.workdir}: preempted, saved at step {step} of {steps[-1]}; the same command goes on from there")
            raise Preempted
    if batches.report.skipped or batches.report.warned:
        for line in batches.report.lines("conversation"):
            log(f"data, this process's since step {start}: {line}")


@contextlib.contextmanager
def _actions(
    run: _Setup, steps: range, workdir: Workdir, checkpointer: Checkpointer, goodput: Goodput, teacher_params: Any
) -> Iterator[list[Action]]:
    """The actions beside the steps, in the order in which they run after each step."""
    config, batches, train = run.config, run.batches, run.config.train
    with contextlib.ExitStack() as opened:
        writers: list[Writer] = []
        if jax.process_index() == 0:
            shown = dict(wandb=train.wandb, run=str(run.workdir), config=config.to_dict())
            opening = open_writers(workdir.logs, steps.start - 1, tensorboard=train.tensorboard, **shown)
            writers = opened.enter_context(opening)
        rates = learning_rates(typed(config).optim, train.steps)
        metrics_log = MetricsLog(
            writers, steps, typed(config).train, goodput, rates, batches.amount, batches.describe, _speed(run)
        )
        profile = dict(at=train.profile_at, length=train.profile_steps)
        actions: list[Action] = [
            opened.enter_context(metrics_log),
            opened.enter_context(Profiler(workdir.logs / "profile", steps, goodput, **profile)),
        ]
        if run.evaluator is not None:
            run.evaluator.sheets = workdir.logs / "answers"
            actions.append(Evaluate(run.evaluator, config.eval.every, metrics_log, goodput, teacher_params))
        every, state_at = train.checkpoint_every, batches.state_at
        actions.append(SaveCheckpoint(checkpointer, workdir, every, state_at, metrics_log, goodput))
        yield actions


def _begin(run: _Setup, checkpointer: Checkpointer) -> tuple[int, Any, Any]:
    """(step, parameters, optimizer state) to go on from: the newest checkpoint's, or those of a new run at step 0."""
    config, state = run.config, run.state
    restored = checkpointer.resume(state.params, state.opt_state, log)
    if restored is None:
        params, step = load_initial_params(config.init_from, config.seed, run.model_config, state, log)
        if step is not None:
            _write_note(run.workdir / BASE, base_of(as_path(config.init_from), step))
        return 0, params, init_opt_state(run.optimizer, params, state)
    run.batches.set_state(restored.about["data"])
    progress = "complete" if restored.step == config.train.steps else "resuming"
    log(f"{run.workdir}: {progress}, at step {restored.step} of {config.train.steps}")
    for name, version in restored.about["versions"].items():
        if version != (now := VERSIONS[name]):
            log(f"{name} {now}: the checkpoint was made by {version}; from here on numbers may differ in rounding")
    return restored.step, restored.params, restored.opt_state


def _load_teacher(run: _Setup) -> tuple[Any, dict | None]:
    """(parameters, what is noted of them) of the run that teaches: of a run that goes on the same as before."""
    if run.teacher is None:
        return None, None
    with bucket_errors(run.workdir):
        recorded = read_object(run.workdir / TEACHER) if run.resuming else None
    params, note = load_teacher(run.teacher, recorded)
    log(f"teacher: {note['run']}, step {note['step']}")
    return params, note


def _write_note(file: AnyPath, note: dict) -> None:
    if jax.process_index() == 0:
        with bucket_errors(file):
            write_text(file, json.dumps(note) + "\n")


def _speed(run: _Setup) -> Speed:
    """The FLOPs of a step, padding included, and the devices' peak."""
    data, train, plan = run.config.data, typed(run.config).train, run.batches.loader.plan
    rows, length, images = data.batch_size * plan.shape.rows, plan.shape.row_length, data.batch_size * plan.shape.images
    flops = training_flops(run.model_config, rows, length, images, train.freeze, train.compress_gradients)
    if train.loss == "distillation":
        teacher, images_per_row = run.teacher, train.distill.images_per_row or plan.most_images_in_a_row()
        rows_of_teacher: Any = run.batches.loader.teaching
        own_length = rows_of_teacher.row_length if teacher is not None and teacher.by_rows else 0
        model = None if teacher is None else teacher.model_config
        flops += teaching_flops(
            train.distill, run.model_config, model, rows, length, images, images_per_row, own_length
        )
    return Speed(flops, peak_flops(run.mesh.devices.flat), run.model_config.compress_length)


def _feed(mesh: Mesh, batches: Batches, count: int) -> Iterator[dict]:
    """Batches on the devices, with normalised pixels; the next one is on its way while a step computes."""
    normalize = jax.jit(batches.loader.processor.normalize)

    def on_devices(batch):
        batch = put_batch(mesh, batch, batches.batch_size)
        return batch | {"pixel_values": normalize(batch["pixel_values"])}

    coming: dict | None = None
    known: set[str] = set()
    for batch in itertools.islice(batches, count):
        for kind in sorted(batches.report.examples.keys() - known):
            known.add(kind)
            log_to_stderr(f"data: first record of this kind: {kind}: {batches.report.examples[kind][0]}")
        following = on_devices(batch)
        if coming is not None:
            yield coming
        coming = following
    if coming is not None:
        yield coming


def _check_best(eval: EvalConfig, train: TrainConfig) -> None:
    """UserError where `train.keep_best` would find checkpoints that were not evaluated."""
    if train.keep_best and not (eval.every and eval.num_batches and train.checkpoint_every % eval.every == 0):
        found = f"found config.eval.every {eval.every}, num_batches {eval.num_batches}"
        raise UserError(f"config.train.keep_best: expected every checkpoint to be evaluated; {found}")


def _check_lengths(conversation: int, row_length: int, model_config: VoCoConfig) -> None:
    """UserError for more tokens than the language model has positions, or than its kernel takes."""
    limit = model_config.llama.max_position_embeddings
    for what, found in ("conversation", conversation), ("compressed image", model_config.compress_length):
        if found > limit:
            raise UserError(
                f"config.model.llama.max_position_embeddings: a {what} has {found} tokens, found room for {limit}"
            )
    try:
        model_config.check_kernels(row_length, training=True)
    except ValueError as error:
        raise model_error(error) from None


def _describe_model(optim: OptimConfig, model_config: VoCoConfig, state: AbstractState) -> None:
    trained_params = state.trainable.trained(state.params)
    total, trained = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, trained_params))
    some = f", {trained:,} of them trained" if trained != total else ""
    log(f"model: {total:,} parameters{some}, compressor {model_config.compressor}, {model_config.dtype}")
    if note := interpreted(model_config.attention):
        log(f"model: {note}")
    if lost := lost_updates(optim.rounding, optim.learning_rate, trained_params):
        log(lost)


def _describe_teacher(teacher: TeacherRun) -> None:
    count, how = (
        sum(x.size for x in jax.tree.leaves(teacher.params)),
        "rows of its own" if teacher.by_rows else "images whole",
    )
    log(f"teacher: {count:,} parameters, reads {how}, {teacher.model_config.dtype}")


def log(line: str) -> None:
    if jax.process_index() == 0:
        print(printable(line), flush=True)


def _try_first_batch(batches: Batches, train_step: Callable, state: AbstractState, teacher: TeacherRun | None) -> None:
    """Make a batch and trace the step with it, without computing. UserError for a step that cannot be computed."""
    batch = batches.peek()
    batch["pixel_values"] = batch["pixel_values"].astype(np.float32)
    batch = whole_shapes(batch, batches.batch_size)
    # Placed as the batches that come will be: the first step takes this trace, and does not make it again
    batch = with_shardings(batch, batch_shardings(jax.sharding.get_mesh(), batch))
    try:
        jax.eval_shape(train_step, state.params, state.opt_state, batch, teacher and teacher.params)
    except (ValueError, NotImplementedError) as error:  # the second where a kernel has no gradient for these shapes
        raise model_error(error) from error
