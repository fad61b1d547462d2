"""The trainer, top down: data, model, optimizer, resume, loop."""

import json
from pathlib import Path
import shutil
import sys
import time

import jax
from ml_collections import ConfigDict
import numpy as np
from tqdm import tqdm

from voco_jax.config import first_difference, load_config, save_config
from voco_jax.data.pipeline import encode_records, make_dataset, report_line
from voco_jax.data.sources import load_records
from voco_jax.data.tokenizer import load_tokenizer, train_tokenizer
from voco_jax.errors import UserError
from voco_jax.run import abstract_model, init_params, make_encoder, make_model_config, make_processor
from voco_jax.train.checkpoint import Checkpointer
from voco_jax.train.optimizer import make_optimizer
from voco_jax.train.step import make_train_step


def train(config: ConfigDict) -> Path:
    """Train as the config says, from the run's newest checkpoint if there is one; returns the run directory."""
    workdir = Path(config.workdir)
    resuming = _check_workdir(workdir, config)

    # Data
    records = load_records(config.data.source, config.data.train_split)
    tokenizer = _make_tokenizer(config, records, workdir if resuming else None)
    model_config = make_model_config(config, tokenizer)
    encoded, counts = encode_records(records, make_encoder(config, tokenizer, model_config), config.data.row_length)
    print(f"data: {config.data.source}/{config.data.train_split}: {len(encoded)} records, {report_line(counts)}")
    batches = iter(make_dataset(encoded, config.data, make_processor(config), config.seed))

    # Model and optimizer
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, abstract_params = abstract_model(model_config)
    train_step = make_train_step(graphdef, optimizer)
    num_params = sum(x.size for x in jax.tree.leaves(abstract_params))
    print(f"model: {num_params:,} parameters, compressor {model_config.compressor}, {model_config.dtype}")

    # Where to begin. The directory comes into being only now, when what can be wrong with the input has shown itself.
    if not resuming:
        _create_workdir(workdir, config, tokenizer)
    checkpointer = Checkpointer(workdir, create=True)
    start = checkpointer.latest_step() or 0
    if start:
        abstract_opt_state = jax.eval_shape(optimizer.init, abstract_params)
        params, opt_state, data_state = checkpointer.restore(start, abstract_params, abstract_opt_state)
        batches.set_state(data_state)
        state = "complete" if start == config.train.steps else "resuming"
        print(f"{workdir}: {state}, at step {start} of {config.train.steps}")
    else:
        params = init_params(model_config, config.seed)
        opt_state = jax.jit(optimizer.init)(params)

    # The loop
    with MetricsLog(workdir / "metrics.jsonl", start, config.train) as log:
        for step in range(start + 1, config.train.steps + 1):
            batch = next(batches)
            count = int(batch.pop("num_conversations").sum())
            params, opt_state, loss = train_step(params, opt_state, batch)
            log.add(step, loss, count)
            if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                checkpointer.save(step, params, opt_state, batches.get_state())
    checkpointer.close()
    return workdir


class MetricsLog:
    """The progress bar and `metrics.jsonl`. A step's loss is read when the next step is already under way."""

    def __init__(self, path: Path, start: int, train: ConfigDict):
        self._path, self._train = path, train
        self._pending: tuple[int, jax.Array] | None = None
        self._losses: list[float] = []
        self._questions, self._since = 0, None
        interval = 0.5 if sys.stderr.isatty() else 20
        self._bar = tqdm(total=train.steps, initial=start, unit="step", desc="training", mininterval=interval)

    def __enter__(self):
        _drop_after(self._path, self._bar.n)
        self._file = self._path.open("a")
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._settle()
        self._file.close()
        self._bar.close()

    def add(self, step: int, loss: jax.Array, questions: int) -> None:
        self._settle()
        self._pending = step, loss
        if self._since is None:  # the first step is compilation
            jax.block_until_ready(loss)
            self._since = time.perf_counter()
            self._bar.unpause()  # or the time left would count it
        else:
            self._questions += questions

    def _settle(self) -> None:
        if self._pending is None:
            return
        step, loss = self._pending
        self._pending = None
        loss = float(loss)
        if not np.isfinite(loss):
            raise UserError(f"training: loss is {loss} at step {step}; a lower optim.learning_rate may help")
        self._losses.append(loss)
        self._bar.update(1)
        if step % self._train.log_every and step != self._train.steps:
            return
        seconds = time.perf_counter() - self._since
        speed = self._questions / seconds if self._questions else 0.0
        mean = float(np.mean(self._losses))
        self._losses.clear()
        self._bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} questions/s")
        line = {
            "step": step,
            "loss": round(mean, 6),
            "questions_per_second": round(speed, 1),
            "seconds": round(seconds, 2),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _check_workdir(workdir: Path, config: ConfigDict) -> bool:
    """Whether the directory holds this very run; UserError if it holds another."""
    if not (workdir / "config.json").exists():
        if workdir.exists() and any(workdir.iterdir()):
            raise UserError(f"workdir {workdir}: expected a run or an empty directory, found other files")
        return False
    difference = first_difference(load_config(workdir / "config.json"), config)
    if difference:
        key, found, expected = difference
        raise UserError(
            f"workdir {workdir}: holds a run with {key} = {found!r}, this config has {expected!r}; "
            "take another --config.workdir or remove it"
        )
    return True


def _make_tokenizer(config: ConfigDict, records, run: Path | None):
    if run is not None:
        return load_tokenizer(run / "tokenizer")
    if config.tokenizer.source != "train":
        return load_tokenizer(config.tokenizer.source)
    texts = {turn["value"] for record in records for turns in record.conversations for turn in turns}
    return train_tokenizer((f"USER: {text} ASSISTANT: {text}" for text in sorted(texts)), config.tokenizer.vocab_size)


def _create_workdir(workdir: Path, config: ConfigDict, tokenizer) -> None:
    """Written apart and renamed: a run directory is whole or not there."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    temporary = workdir.with_name(f".{workdir.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tokenizer.save_pretrained(temporary / "tokenizer")
    save_config(config, temporary / "config.json")
    if workdir.exists():
        workdir.rmdir()  # empty, as _check_workdir saw
    temporary.rename(workdir)


def _drop_after(path: Path, step: int) -> None:
    """Forget the lines of steps that a killed run logged after its last checkpoint: they are about to come again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines))
