"""The trainer, top down: data, model, optimizer, resume, loop."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from voco_jax.data.conversations import get_template
from voco_jax.data.pipeline import encode_records, make_dataset, report_line
from voco_jax.data.sources import load_records
from voco_jax.data.tokenizer import load_tokenizer, train_tokenizer
from voco_jax.errors import UserError
from voco_jax.run import (
    abstract_model,
    begin_with_run,
    init_params,
    make_encoder,
    make_model_config,
    make_processor,
)
from voco_jax.train.checkpoint import Checkpointer
from voco_jax.train.metrics import MetricsLog
from voco_jax.train.optimizer import make_optimizer
from voco_jax.train.step import make_train_step
from voco_jax.train.workdir import check_workdir, open_workdir


def train(config: ConfigDict) -> Path:
    """Train as the config says, from the run's newest checkpoint if there is one; returns the run directory."""
    config = begin_with_run(config)
    workdir = Path(config.workdir).expanduser()
    resuming = check_workdir(workdir, config)

    # Data
    records = load_records(config.data.source, config.data.train_split)
    load_records(config.data.source, config.data.test_split)  # a wrong name should not show itself after training
    tokenizer = _make_tokenizer(config, records, workdir if resuming else None)
    model_config = make_model_config(config, tokenizer)
    encoded, counts = encode_records(records, make_encoder(config, tokenizer, model_config), config.data.row_length)
    print(f"data: {config.data.source}/{config.data.train_split}: {len(encoded)} records, {report_line(counts)}")
    _check_positions(encoded, model_config)
    batches = iter(make_dataset(encoded, config.data, make_processor(config), config.seed))

    # Model and optimizer
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, abstract_params = abstract_model(model_config)
    abstract_opt_state = jax.eval_shape(optimizer.init, abstract_params)
    train_step = make_train_step(graphdef, optimizer)
    num_params = sum(x.size for x in jax.tree.leaves(abstract_params))
    print(f"model: {num_params:,} parameters, compressor {model_config.compressor}, {model_config.dtype}")

    # The directory comes into being only now, when what can be wrong with the input has shown itself
    if not resuming:
        _try_first_batch(batches, train_step, abstract_params, abstract_opt_state)
    with (
        open_workdir(workdir, config, tokenizer),
        contextlib.closing(Checkpointer(workdir, create=True)) as checkpointer,
    ):
        # Where to begin
        start = checkpointer.latest_step() or 0
        if start:
            params, opt_state, data_state = checkpointer.restore(start, abstract_params, abstract_opt_state)
            batches.set_state(data_state)
            state = "complete" if start == config.train.steps else "resuming"
            print(f"{workdir}: {state}, at step {start} of {config.train.steps}")
        else:
            params = _first_params(config, model_config, abstract_params)
            opt_state = jax.jit(optimizer.init)(params)

        # The loop
        with MetricsLog(workdir / "metrics.jsonl", start, config.train) as log:
            for step in range(start + 1, config.train.steps + 1):
                batch = next(batches)
                count = int(batch.pop("num_conversations").sum())
                params, opt_state, loss = train_step(params, opt_state, batch)
                log.add(step, loss, count)
                if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                    log.settle()
                    _check_finite(params, step)
                    checkpointer.save(step, params, opt_state, batches.get_state())
    return workdir


def _first_params(config: ConfigDict, model_config, abstract_params):
    """Those of the run to begin with, in this run's dtype; or random ones."""
    if not config.init_from:
        return init_params(model_config, config.seed)
    with contextlib.closing(Checkpointer(Path(config.init_from).expanduser())) as checkpointer:
        step, params = checkpointer.restore_params(abstract_params)
    print(f"parameters: {config.init_from}, step {step}")
    return params


def _check_positions(encoded, model_config) -> None:
    """UserError for more tokens than the language model has positions."""
    limit = model_config.llama.max_position_embeddings
    conversation = max(len(sample) for record in encoded for sample in record.samples)
    for what, found in ("conversation", conversation), ("compressed image", model_config.compress_length):
        if found > limit:
            raise UserError(
                f"config.model.llama.max_position_embeddings: a {what} has {found} tokens, found room for {limit}"
            )


def _try_first_batch(batches, train_step, abstract_params, abstract_opt_state) -> None:
    """Make a batch and trace the step with it, computing nothing; what cannot be done raises here."""
    state = batches.get_state()
    batch = next(batches)
    batch.pop("num_conversations")
    batches.set_state(state)
    try:
        jax.eval_shape(train_step, abstract_params, abstract_opt_state, batch)
    except ValueError as error:
        raise UserError(f"config.model: {str(error).splitlines()[0]}") from error


@jax.jit
def _all_finite(params) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _check_finite(params, step: int) -> None:
    """Parameters that are no numbers must not become the checkpoint that everything goes on from."""
    if not _all_finite(params):
        raise UserError(f"training: parameters are not finite after step {step}; a lower optim.learning_rate may help")


def _make_tokenizer(config: ConfigDict, records, run: Path | None):
    if run is not None:
        return load_tokenizer(run / "tokenizer")
    if config.tokenizer.source != "train":
        return load_tokenizer(config.tokenizer.source)
    texts = {turn.get("value", "") for record in records for turns in record.conversations for turn in turns}
    system = get_template(config.data.template).system
    prompts = (f"{system}{' ' if system else ''}USER: {text} ASSISTANT: {text}" for text in sorted(texts))
    return train_tokenizer(prompts, config.tokenizer.vocab_size)
