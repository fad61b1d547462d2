"""The trainer, top down: data, model, optimizer, resume, loop."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import itertools
from pathlib import Path
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
import numpy as np
import optax
from tqdm import tqdm

from voco_jax.data.pipeline import Batches
from voco_jax.data.sources import open_sources
from voco_jax.errors import UserError
from voco_jax.models.voco import VoCoConfig
from voco_jax.parallel.distributed import check_same, together
from voco_jax.parallel.mesh import make_mesh
from voco_jax.parallel.sharding import batch_shardings, local_rows, put_batch, whole_shapes
from voco_jax.run import begin_with_run, make_processor
from voco_jax.train.checkpoint import Checkpointer
from voco_jax.train.data import open_training_data
from voco_jax.train.first_params import first_params
from voco_jax.train.metrics import MetricsLog
from voco_jax.train.optimizer import make_optimizer
from voco_jax.train.state import AbstractState, abstract_state, init_opt_state
from voco_jax.train.step import make_train_step
from voco_jax.train.workdir import check_workdir, open_workdir, workdir_path


class _Setup(NamedTuple):
    """What can be made, and found wrong, before a directory is written."""

    config: ConfigDict
    workdir: Path
    resuming: bool
    mesh: Mesh
    tokenizer: Any
    model_config: VoCoConfig
    batches: Batches
    optimizer: optax.GradientTransformation
    state: AbstractState
    train_step: Callable


def train(config: ConfigDict) -> Path:
    """Train as the config says, from the run's newest checkpoint if there is one; returns the run directory.

    Several processes (`voco_jax/parallel/distributed.py`) call it together.
    """
    with together():  # so nothing in it waits for other processes
        run = _set_up(config)
    vocabulary = sorted(run.tokenizer.get_vocab().items())
    plan = run.batches.get_state()["plan"]
    check_same(
        {"config": run.config, "contents of the workdir": run.resuming, "tokenizer": vocabulary, "data files": plan}
    )
    with jax.set_mesh(run.mesh):
        _train(run)
    return run.workdir


def _set_up(config: ConfigDict) -> _Setup:
    config = begin_with_run(config)
    workdir = workdir_path(config)
    resuming = check_workdir(workdir, config)
    mesh = make_mesh(config.mesh)

    # Data
    shard = local_rows(mesh, config.data.batch_size)  # every process loads the rows of its own devices
    tokenizer, model_config, batches, longest = open_training_data(
        config, run=workdir if resuming else None, shard=shard, say=_say
    )
    if config.data.test:
        open_sources(config, "test")  # a wrong name should not show itself after training
    _check_positions(longest, model_config)

    # Model and optimizer, their places on the mesh
    optimizer = make_optimizer(config)
    with jax.set_mesh(mesh):
        state = abstract_state(config, model_config, optimizer, mesh)
        train_step = make_train_step(
            state.graphdef, optimizer, state.freezing, state.shardings, config.train.accumulate
        )
        num_params = _count(state.freezing.trained(state.params))
        num_frozen = _count(state.params) - num_params
        frozen = f" and {num_frozen:,} frozen" if num_frozen else ""
        _say(f"model: {num_params:,} parameters{frozen}, compressor {model_config.compressor}, {model_config.dtype}")
        # The directory comes into being only later, when what can be wrong with the input has shown itself
        if not resuming:
            _try_first_batch(config, batches, train_step, state)
    return _Setup(config, workdir, resuming, mesh, tokenizer, model_config, batches, optimizer, state, train_step)


def _train(run: _Setup) -> None:
    config, state, batches, workdir = run.config, run.state, run.batches, run.workdir
    with (
        open_workdir(workdir, config, run.tokenizer),
        contextlib.closing(Checkpointer(workdir, create=True)) as checkpointer,
        contextlib.closing(batches),
    ):
        # Where to begin
        start = checkpointer.latest_step() or 0
        if start:
            params, opt_state, data_state = checkpointer.restore(start, state.params, state.opt_state)
            batches.set_state(data_state)
            progress = "complete" if start == config.train.steps else "resuming"
            _say(f"{workdir}: {progress}, at step {start} of {config.train.steps}")
        else:
            params = first_params(config, run.model_config, state, _say)
            opt_state = init_opt_state(run.optimizer, params, state)

        # The loop
        steps = range(start + 1, config.train.steps + 1)
        with MetricsLog(workdir / "metrics.jsonl", start, config.train) as log:
            for step, batch in zip(steps, _feed(config, run.mesh, batches, len(steps)), strict=True):
                params, opt_state, metrics = run.train_step(params, opt_state, batch)
                log.add(step, metrics["loss"], batches.count(step - 1))
                if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                    log.settle()
                    _check_finite(params, step)
                    checkpointer.save(step, params, opt_state, batches.state_at(step))
    if batches.report.bad or batches.report.odd:
        for line in batches.report.lines("conversations"):
            _say(f"data, this process's since step {start}: {line}")


def _feed(config: ConfigDict, mesh: Mesh, batches: Batches, count: int) -> Iterator[dict]:
    """Batches on the devices, pictures normalised there, the next one always on its way while a step computes."""
    normalize = jax.jit(make_processor(config).normalize)

    def on_devices(batch):
        batch = put_batch(mesh, batch, batches.shard, config.data.batch_size)
        return batch | {"pixel_values": normalize(batch["pixel_values"])}

    coming, known = None, set()
    for batch in itertools.islice(batches, count):
        for kind in sorted(batches.report.examples.keys() - known):
            known.add(kind)
            tqdm.write(f"data: first record of this kind: {kind}: {batches.report.examples[kind][0]}", file=sys.stderr)
        following = on_devices(batch)
        if coming is not None:
            yield coming
        coming = following
    if coming is not None:
        yield coming


def _check_positions(conversation: int, model_config) -> None:
    """UserError for more tokens than the language model has positions."""
    limit = model_config.llama.max_position_embeddings
    for what, found in ("conversation", conversation), ("compressed image", model_config.compress_length):
        if found > limit:
            raise UserError(
                f"config.model.llama.max_position_embeddings: a {what} has {found} tokens, found room for {limit}"
            )


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _count(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _try_first_batch(config: ConfigDict, batches: Batches, train_step, state: AbstractState) -> None:
    """Make a batch and trace the step with it, computing nothing; what cannot be done raises here."""
    batch = batches.peek()
    batch["pixel_values"] = batch["pixel_values"].astype(np.float32)
    batch = whole_shapes(batch, config.data.batch_size)
    batch_shardings(jax.sharding.get_mesh(), batch)
    try:
        jax.eval_shape(train_step, state.params, state.opt_state, batch)
    except ValueError as error:
        raise UserError(f"config.model: {str(error).splitlines()[0]}") from error


@functools.partial(jax.jit, out_shardings=P())
def _all_finite(params) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _check_finite(params, step: int) -> None:
    """Parameters that are no numbers must not become the checkpoint that everything goes on from."""
    if not _all_finite(params):
        raise UserError(f"training: parameters are not finite after step {step}; a lower optim.learning_rate may help")
