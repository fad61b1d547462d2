"""How long a checkpoint keeps a training waiting: written behind its back, and waited for.

    python -m benchmarks.checkpoint --out docs/checkpoint.json            # 1 GB a save; needs 4 GB of disk

Real training steps, with the trainer's own step and `Checkpointer`. A round takes some steps with no save about, then
a save that the loop waits for (`synchronous`: until all of it is in place), then one that it does not
(`blocks`: until `save` returns), with steps for as long as that is being written. The two kinds take turns at coming
first. Medians of `--rounds`.
"""

import argparse
from collections.abc import Callable
import contextlib
import json
import os
from pathlib import Path
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import machine, others
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.config import default_config, typed
from voco_jax.models.build import init_params
from voco_jax.models.voco import VoCoConfig
from voco_jax.parallel.mesh import make_mesh
from voco_jax.parallel.sharding import put_batch
from voco_jax.train.from_config import abstract_state, make_optimizer, train_step_of
from voco_jax.train.state import init_opt_state

PLAIN_STEPS = 4  # of a round, with no save about


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    parser.add_argument("--dir", type=Path, help="where checkpoints are written (default: the system's scratch)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=11, help="of the language model (default 11: 1 GB of state)")
    parser.add_argument("--rows", type=int, default=4, help="of 64 tokens in a step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        figures = {
            "machine": machine(),
            "load_before": others(),
            **measure(Path(scratch), args.layers, args.rows, args.rounds),
        }
    print(table(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def measure(scratch: Path, layers: int, rows: int, rounds: int) -> dict:
    """Train and save by turns; see the module."""
    trainer = Trainer(layers, rows)
    seconds: dict[str, list[float]] = {name: [] for name in ("synchronous", "blocks", "writes", "step", "beside")}
    with contextlib.closing(Checkpointer(scratch, create=True)) as checkpointer:
        saved = 0

        def save():
            nonlocal saved
            saved += 1
            checkpointer.save(saved, trainer.params, trainer.opt_state, {"position": saved})

        def synchronous():
            seconds["synchronous"].append(timed(lambda: (save(), checkpointer.wait())))

        def asynchronous():
            start = time.perf_counter()
            seconds["blocks"].append(timed(save))
            beside = []
            while checkpointer.saving():
                beside.append(timed(trainer.step))
            checkpointer.wait()
            seconds["writes"].append(time.perf_counter() - start)
            seconds["beside"].extend(beside[:-1] or beside)  # the last may have ended after the writing

        for _ in range(2):  # compiles; makes directories and threads
            trainer.step()
            save()
            checkpointer.wait()
        for number in range(rounds):
            os.sync()
            seconds["step"].extend(timed(trainer.step) for _ in range(PLAIN_STEPS))
            for kind in (synchronous, asynchronous) if number % 2 else (asynchronous, synchronous):
                kind()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    shares = [blocks / whole for blocks, whole in zip(seconds["blocks"], seconds["synchronous"], strict=True)]
    return {
        "gb": round(trainer.nbytes / 1e9, 2),
        "rounds": rounds,
        "synchronous_save_s": round(median["synchronous"], 3),
        "asynchronous_save_blocks_s": round(median["blocks"], 3),
        "blocks_share": round(statistics.median(shares), 4),
        "blocks_share_of_rounds": [round(share, 4) for share in sorted(shares)],
        "asynchronous_save_until_written_s": round(median["writes"], 3),
        "step_s": round(median["step"], 3),
        "step_beside_a_save_s": round(median["beside"], 3),
        "step_beside_a_save_ratio": round(median["beside"] / median["step"], 2),
    }


class Trainer:
    """A training of random tokens with the trainer's step: parameters and two moments, all in float32."""

    def __init__(self, layers: int, rows: int):
        config = default_config()
        config.model.llama.update(
            vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, head_dim=64,
            num_attention_heads=12, num_key_value_heads=12,
        )  # fmt: skip
        model = typed(config).model
        model_config = VoCoConfig(model.llama, model.vision, voco_token_id=7999, suffix_ids=(5, 6))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        jax.set_mesh(mesh)
        optimizer = make_optimizer(config)
        state = abstract_state(config, model_config, optimizer, mesh)
        self._step = train_step_of(config, state, optimizer)
        self.params = init_params(model_config, config.seed, shardings=state.shardings[0])
        self.opt_state = init_opt_state(optimizer, self.params, state)
        self._batch = put_batch(mesh, random_batch(rows, 64, config))

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.params, self.opt_state)))

    def step(self) -> None:
        """A step, waited for."""
        self.params, self.opt_state, metrics = self._step(self.params, self.opt_state, self._batch)
        jax.block_until_ready((self.params, self.opt_state))
        if not jnp.isfinite(metrics["loss"]):
            raise ValueError(f"loss {metrics['loss']}")


def random_batch(rows: int, length: int, config) -> dict:
    """Text without pictures' slots, a picture a row."""
    rng = np.random.default_rng(0)
    size = config.model.vision.image_size
    tokens = rng.integers(10, 7000, size=(rows, length)).astype(np.int32)
    return {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy(),
        "segment_ids": np.ones_like(tokens),
        "slot_index": np.where(np.arange(length) == 0, 0, -1).astype(np.int32) * np.ones_like(tokens),
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.ones(tokens.shape, np.float32),
        "pixel_values": rng.normal(size=(rows, 1, size, size, 3)).astype(np.float32),
    }


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def table(figures: dict) -> str:
    f = figures
    return "\n".join(
        (
            f"{f['gb']} GB of parameters and moments, {f['machine']}, medians of {f['rounds']} rounds",
            "| | seconds |",
            "|---|---:|",
            f"| a save, waited for | {f['synchronous_save_s']} |",
            f"| an asynchronous one keeps the loop | {f['asynchronous_save_blocks_s']} ({f['blocks_share']:.1%}) |",
            f"| and is written after | {f['asynchronous_save_until_written_s']} |",
            f"| a step | {f['step_s']} |",
            f"| a step beside a save | {f['step_beside_a_save_s']} ({f['step_beside_a_save_ratio']} times) |",
        )
    )


if __name__ == "__main__":
    main()
