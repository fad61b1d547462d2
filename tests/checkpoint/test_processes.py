"""A run's directory in the hands of two real processes: who writes what, checkpoints in shards, and errors of one."""

import fcntl
import json

import jax
import numpy as np
import pytest

from tests.parallel.test_distributed import free_port, run_two
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.convert.jax_checkpoint import of_newest

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import sys
from voco_jax.errors import UserError, one_line_errors
from voco_jax.parallel import distributed

@one_line_errors
def main(address, process, workdir, fault):
    distributed.start(address, 2, process, 60)
    import contextlib, pathlib, time
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from tests.helpers import tiny
    from voco_jax.data.tokenizer import train_tokenizer
    from voco_jax.checkpoint import workdir as directories
    from voco_jax.checkpoint.checkpointer import Checkpointer
    from voco_jax.data.plan import Amount
    from voco_jax.train.goodput import Goodput
    from voco_jax.config import typed
    from voco_jax.train.actions import StepDone
    from voco_jax.train.metrics import MetricsLog
    from voco_jax.train.writers import open_writers

    directories._SEEN_WITHIN = 1
    if fault == "not shared" and process:
        workdir += "-elsewhere"
    workdir = pathlib.Path(workdir)
    config, tokenizer = tiny.config(workdir), train_tokenizer(["USER: a red cat ASSISTANT: no"] * 9, vocab_size=300)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layers = lambda spec: NamedSharding(mesh, spec)
    wide, tall, same = layers(P(None, "fsdp", "tensor")), layers(P(None, "tensor", "fsdp")), layers(P())
    make = lambda: (jnp.arange(192.0).reshape(4, 8, 6), jnp.arange(3.0), jnp.float32(2.5))
    kernel, scale, loss = jax.jit(make, out_shardings=(wide, same, same))()
    params, opt_state = {"layers": {"kernel": kernel}, "scale": scale}, {"mean": kernel}
    with directories.open_workdir(workdir, config, tokenizer):
        with contextlib.closing(Checkpointer(workdir, create=True)) as checkpointer:
            account = workdir / "goodput.json" if process == 0 else None
            opened = open_writers(workdir, 0) if process == 0 else contextlib.nullcontext([])
            writers = opened.__enter__()
            values = range(1, 41), typed(config).train
            more = np.zeros(40), lambda batch: Amount(2, 9, 1)
            with Goodput(account) as goodput, MetricsLog(writers, *values, goodput, *more) as log:
                for step in range(1, 5):
                    metrics = {"loss": loss if fault != "no number" else loss * jnp.nan}
                    log.after_step(StepDone(step, jax.block_until_ready(metrics)))
                log.settle()
                with distributed.together():
                    if fault == "one fails" and process == 1:
                        raise UserError("this one is full")
                checkpointer.save(4, params, opt_state, {"next": 4})
    abstract = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
    target = {"layers": {"kernel": abstract(kernel, tall)}, "scale": abstract(scale, same)}
    with contextlib.closing(Checkpointer(workdir)) as checkpointer:
        _, back, mean, about, _ = checkpointer.restore(4, target, {"mean": abstract(kernel, wide)})
    whole = np.arange(192.0).reshape(4, 8, 6)
    for array in (back["layers"]["kernel"], mean["mean"]):
        assert len(array.sharding.device_set) == 4
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    assert about["data"] == {"next": 4}
    print("done", process)

main(*eval(sys.argv[1]))
"""


def run(workdir, fault=""):
    address = f"localhost:{free_port()}"
    return run_two(lambda i: (address, i, str(workdir), fault), lambda i: {}, script=SCRIPT)


def errors(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(("error: ", "Traceback"))]


def test_two_processes_share_a_directory(tmp_path):
    workdir = tmp_path / "run"
    first, second = run(workdir)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.endswith("done 0\n") and second.stdout.endswith("done 1\n")
    assert "step 4/40  loss 2.500" in first.stderr and "step" not in second.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(4, 2.5)]
    assert {path.name for path in workdir.iterdir()} == {
        ".lock", "checkpoints", "config.json", "goodput.json", "metrics.jsonl", "tensorboard", "tokenizer",
    }  # fmt: skip
    # One process, and the converter, read what two have written
    kernel = np.arange(192.0, dtype=np.float32).reshape(4, 8, 6)
    abstract = {"layers": {"kernel": jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)}}
    abstract["scale"] = jax.ShapeDtypeStruct((3,), np.float32)
    step, params = Checkpointer(workdir).restore_params(abstract)[:2]
    assert step == 4
    np.testing.assert_array_equal(params["layers"]["kernel"], kernel)
    np.testing.assert_array_equal(of_newest(workdir, lambda stored: stored).read("layers.kernel", 2), kernel[2])


def test_a_directory_that_is_held(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first, second = run(workdir)
    held = f"workdir {workdir}: another process is training in it"
    assert errors(first) == [f"error: {held}"] and errors(second) == [f"error: process 0: {held}"]
    assert first.returncode == second.returncode == 2
    assert [path.name for path in workdir.iterdir()] == [".lock"]


def test_hosts_that_share_no_directory(tmp_path):
    first, second = run(tmp_path / "run", "not shared")
    assert first.returncode == second.returncode == 2
    assert "run-elsewhere: expected a directory that all hosts share" in errors(second)[0]
    assert errors(first)[0].startswith(f"error: process 1: workdir {tmp_path / 'run-elsewhere'}: ")
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_error_of_one_is_an_error_of_all(tmp_path):
    first, second = run(tmp_path / "run", "one fails")
    assert errors(second) == ["error: this one is full"] and errors(first) == ["error: process 1: this one is full"]


def test_a_loss_that_is_no_number_ends_all(tmp_path):
    for done in run(tmp_path / "run", "no number"):
        assert done.returncode == 2 and errors(done)[0].startswith("error: training: loss is nan at step 1")
