"""What comes back is what was saved, or the one before it and a word about it; never anything else."""

import contextlib
import gc
import itertools
import os
from pathlib import Path
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from tests.train.test_training import params
from voco_jax.checkpoint.checkpointer import Checkpointer, Damaged
from voco_jax.checkpoint.checksums import (
    PartedSum,
    _joined,
    _on_cpu,
    _on_device,
    _value,
    as_earlier,
    checksums,
    is_same,
)
from voco_jax.checkpoint.run import load_run
from voco_jax.checkpoint.run_files import VERSIONS
from voco_jax.checkpoint.workdir import open_workdir
from voco_jax.config import default_config, load_config
from voco_jax.convert.jax_checkpoint import of_newest
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.errors import UserError
from voco_jax.train.loop import train
from voco_jax.train.metrics import MetricsLog
from voco_jax.train.writers import JsonLines


def config(**keep):
    config = default_config()
    for key, value in keep.items():
        config.train[key] = value
    return config


def state(seed: int = 0):
    rng = np.random.default_rng(seed)
    params = {"layers": {"kernel": rng.normal(size=(3, 8, 6))}, "scale": rng.normal(size=5)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def save(run: Path, *steps: int, losses=(), **keep) -> None:
    checkpointer = Checkpointer(run, create=True, config=config(**keep))
    for i, step in enumerate(steps):
        metrics = {"eval_loss": losses[i]} if losses and losses[i] is not None else None
        checkpointer.save(step, state(step), {"m": state(-step % 97)}, {"batches": step}, metrics)
    checkpointer.close()


def resume(run: Path, said: list | None = None):
    abstract = jax.eval_shape(state)
    checkpointer = Checkpointer(run, create=True, config=config())
    restored = checkpointer.resume(abstract, {"m": abstract}, (said if said is not None else []).append)
    checkpointer.close()
    return restored


def test_a_checkpoint_holds_everything(tmp_path):
    save(tmp_path, 7)
    restored = resume(tmp_path)
    assert restored.step == restored.about["step"] == 7
    assert restored.about["data"] == {"batches": 7}
    assert restored.about["versions"] == VERSIONS and VERSIONS["jax"] == jax.__version__
    assert restored.about["config"]["optim"]["learning_rate"] == 1e-3
    jax.tree.map(np.testing.assert_array_equal, restored.params, state(7))
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, {"m": state(90)})
    assert resume(tmp_path / "empty") is None


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (dict(keep=2), [5, 6]),
        (dict(keep=1, keep_every=2), [2, 4, 6]),
        (dict(keep=1, keep_best=2), [2, 4, 6]),  # 4 and 2 have the lowest losses, 6 is the newest
        (dict(keep=1, keep_best=1, keep_every=5), [4, 5, 6]),
    ],
)
def test_which_are_kept(tmp_path, keep, left):
    save(tmp_path, 1, 2, 3, 4, 5, 6, losses=[None, 0.5, 0.9, 0.1, 0.7, 0.8], **keep)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == left[::-1]
    assert checkpointer.best_step() == (4 if 4 in left else 5)


def damage_truncated(step: Path):
    for file in step.rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def damage_one_byte(step: Path):
    """In the middle of the largest file of data: nothing that Orbax looks at says so."""
    file = max(step.glob("params/**/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_a_digit(step: Path):
    """Where the data stands is another number, and JSON all the same."""
    file = step / "run" / "metadata"
    text = file.read_text()
    assert '"batches": 3' in text
    file.write_text(text.replace('"batches": 3', '"batches": 7'))


def damage_another_step(step: Path):
    """Whole, but of step 1."""
    shutil.rmtree(step)
    shutil.copytree(step.parent / "1", step)


def damage_other_numbers(step: Path):
    """Files that are whole, of another checkpoint."""
    shutil.rmtree(step / "params")
    shutil.copytree(step.parent / "1" / "params", step / "params")


DAMAGES = {
    "truncated": damage_truncated,
    "one byte": damage_one_byte,
    "a digit of run": damage_a_digit,
    "another step": damage_another_step,
    "other numbers": damage_other_numbers,
    "no params": lambda step: shutil.rmtree(step / "params"),
    "no optimizer": lambda step: shutil.rmtree(step / "opt_state"),
    "no run": lambda step: shutil.rmtree(step / "run"),
    "empty": lambda step: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in step.iterdir()],
    "no metadata": lambda step: (step / "params" / "_METADATA").unlink(),
    "run says nothing": lambda step: (step / "run" / "metadata").write_text("{}"),
    "run cut off": lambda step: os.truncate(step / "run" / "metadata", 100),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_older_one_where_the_newest_is_damaged(tmp_path, damage):
    save(tmp_path, 1, 2, 3, keep=3)
    DAMAGES[damage](tmp_path / "checkpoints" / "3")
    said = []
    restored = resume(tmp_path, said)
    assert restored.step == 2
    jax.tree.map(np.testing.assert_array_equal, restored.params, state(2))
    (line,) = said
    assert line.startswith(f"{tmp_path}/checkpoints/3: the checkpoint is damaged: ") and "\n" not in line
    assert line.endswith("; it is kept as 3.damaged, and step 2 taken")
    assert (tmp_path / "checkpoints" / "3.damaged").is_dir()
    save(tmp_path, 3, keep=3)  # there is room for a new one
    assert resume(tmp_path).step == 3


def test_reads_that_are_dropped_say_nothing(tmp_path, monkeypatch, caplog):
    """Of many arrays the first that cannot be read is enough; the others once ended in stack traces, later."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    many = {"layers": {f"kernel_{i}": jnp.ones((3, 8, 6)) for i in range(60)}}
    checkpointer = Checkpointer(tmp_path, create=True, config=config())
    checkpointer.save(1, many, {"m": many}, {})
    checkpointer.wait()
    damage_truncated(tmp_path / "checkpoints" / "1")
    abstract = jax.eval_shape(lambda: many)
    for _ in range(8):
        with pytest.raises(Damaged):
            checkpointer.restore(1, abstract, {"m": abstract})
    checkpointer.close()
    gc.collect()
    time.sleep(0.2)
    assert not said and not [record for record in caplog.records if record.name == "asyncio"]


def test_all_are_damaged(tmp_path):
    save(tmp_path, 1, 2)
    for step in "12":
        damage_truncated(tmp_path / "checkpoints" / step)
    with pytest.raises(Damaged, match="checkpoints/2: the checkpoint is damaged: "):
        resume(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_another_models_is_no_damage(tmp_path):
    save(tmp_path, 1, 2)
    abstract = jax.eval_shape(state)
    abstract["scale"] = jax.ShapeDtypeStruct((6,), jnp.float32)
    with pytest.raises(UserError, match=r"checkpoints/2: scale: expected shape \(6,\), found shape \(5,\)$"):
        Checkpointer(tmp_path).resume(abstract, {"m": abstract}, print)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_full_disk(tmp_path, capfd, caplog):
    """One line that names the checkpoint and the reason, and what was there stays. (A limit of a file's size stands
    for the disk, which tests cannot fill.)"""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)
    large = {f"kernel_{i}": jnp.asarray(rng.normal(size=(200, 200)), jnp.float32) for i in range(9)}
    with contextlib.closing(Checkpointer(tmp_path, create=True, config=config())) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        try:
            line = f"^{tmp_path}/checkpoints/2: the checkpoint cannot be written: [^\n]*File too large$"
            with pytest.raises(UserError, match=line):
                checkpointer.save(2, large, {"m": large}, {})
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    # Neither Orbax's own account nor the writes of other arrays, which end later
    assert "Traceback" not in capfd.readouterr().err and not caplog.records
    assert Checkpointer(tmp_path).steps() == [1] and resume(tmp_path).step == 1


@pytest.mark.multiprocess
def test_a_full_disk_ends_a_training(tmp_path):
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "sys.argv = ['train', *eval(sys.argv[1])]; runpy.run_module('voco_jax.train', run_name='__main__')"
    )
    arguments = tiny.arguments(tmp_path / "run", train__checkpoint_every=2, train__tensorboard=False)
    done = subprocess.run(
        [sys.executable, "-c", script, repr(arguments)],
        capture_output=True, text=True, cwd=tiny.CONFIG_FILE.parents[1],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},  # whose programs the limit would cut off
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "checkpoints/2: the checkpoint cannot be written: " in errors[0], done.stderr
    assert errors[0].endswith("File too large")
    assert "ERROR:absl" not in done.stderr and "Traceback" not in done.stderr


def test_a_clock_that_jumps(tmp_path, monkeypatch):
    """As that of a machine that was paused: by 25 minutes at every look."""
    before, jumps = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: before() + 1500 * next(jumps))
    save(tmp_path, 1, 2)
    assert next(jumps) > 10  # Orbax has looked
    assert resume(tmp_path).step == 2


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the log is opened", "in the steps"])
def test_a_workdir_that_goes_away(tiny_run, tmp_path, monkeypatch, moment):
    """While a training runs in it: one line, and no half of a run under its name."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "40")
    owner, method = (JsonLines, "__init__") if moment == "before the log is opened" else (MetricsLog, "after_step")
    as_ever = getattr(owner, method)

    def and_moved(log, *args):
        if run.exists():
            run.rename(tmp_path / "elsewhere")
        return as_ever(log, *args)

    monkeypatch.setattr(owner, method, and_moved)
    with pytest.raises(UserError, match=f"workdir {run}: is there no more, or is another directory: it was deleted"):
        train(tiny.config(run, train__tensorboard=False))
    assert not run.exists()


def test_a_workdir_that_is_replaced(tiny_run, tmp_path):
    config, tokenizer = load_config(tiny_run / "config.json"), load_tokenizer(tiny_run / "tokenizer")
    with open_workdir(tmp_path / "run", config, tokenizer) as workdir:
        workdir.check()
        line = f"workdir {tmp_path}/run: is there no more, or is another directory"
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        shutil.copytree(tmp_path / "elsewhere", tmp_path / "run")
        with pytest.raises(UserError, match=line):
            workdir.check()
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "elsewhere").rename(tmp_path / "run")
        (tmp_path / "run" / ".lock").unlink()  # by hand, which takes nothing from the run
        workdir.check()
        (tmp_path / "run" / "config.json").unlink()
        with pytest.raises(UserError, match=line):
            workdir.check()
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tiny_run, tmp_path / "run")
        with pytest.raises(UserError, match=line):
            workdir.check()


def test_parameters_alone(tmp_path, capsys):
    """In another dtype too, of any step; the newest that is whole, where none is asked for."""
    save(tmp_path, 1, 2)
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), jax.eval_shape(state))
    step, restored = Checkpointer(tmp_path).restore_params(narrow)[:2]
    assert step == 2
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), restored, state(2))
    assert Checkpointer(tmp_path).restore_params(narrow, 1)[0] == 1
    with pytest.raises(UserError, match="checkpoints: no checkpoint found of step 5; there are 2, 1$"):
        Checkpointer(tmp_path).restore_params(narrow, 5)
    damage_one_byte(tmp_path / "checkpoints" / "2")
    with pytest.raises(Damaged, match="checkpoints/2: the checkpoint is damaged: "):
        Checkpointer(tmp_path).restore_params(narrow, 2)
    assert Checkpointer(tmp_path).restore_params(narrow)[0] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/checkpoints/2: the checkpoint is damaged: ")
    assert line.endswith("; step 1 is taken")


@pytest.mark.parametrize("kind", ["empty", "no params", "no metadata", "truncated"])
def test_readers_pass_over_what_is_not_whole(tmp_path, kind, capsys):
    """Of a copy that was broken off, say; of all that read a run: asking, evaluating, converting, beginning with it."""
    save(tmp_path, 1, 2, 900, losses=[0.2, 0.3, 0.1], keep=3)
    DAMAGES[kind](tmp_path / "checkpoints" / "900")
    checkpointer = Checkpointer(tmp_path)
    step, restored = checkpointer.restore_params(jax.eval_shape(state))[:2]
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, restored, state(2))
    assert "checkpoints/900: the checkpoint is damaged: " in capsys.readouterr().err
    if kind != "truncated":  # whose names and shapes may still be there to be read
        assert of_newest(tmp_path, lambda stored: stored.step) == 2
    if kind == "empty":
        assert checkpointer.best_step() == 1
    assert (tmp_path / "checkpoints" / "900").is_dir()  # a reader changes nothing
    for step in "12":
        DAMAGES["empty"](tmp_path / "checkpoints" / step)
    with pytest.raises(Damaged, match="checkpoints/900: the checkpoint is damaged: "):
        checkpointer.restore_params(jax.eval_shape(state))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_checksums(dtype):
    """The same on the host and on devices, as a whole and in parts; any one bit and any place counts."""
    values = np.random.default_rng(0).integers(0, 200, (4, 6, 5))
    array = jnp.asarray(values, dtype)
    sum_, shape = sum_of(array), array.shape
    places = [(slice(0, 2), slice(0, 6)), (slice(2, 4), slice(0, 4)), (slice(2, 4), slice(4, 6))]
    for part in (_on_cpu, _on_device):
        parts = [part(array[place], shape, (place[0].start, place[1].start, 0)) for place in places]
        assert _value(_joined(parts)) == sum_ == _value(part(array, shape, (0, 0, 0)))
    for parted in ({i: array[i] for i in range(4)}, {None: array}):
        whole = PartedSum(shape)
        assert all(whole.add(key, np.asarray(part)) for key, part in parted.items()) and whole.value() == sum_
    words = np.asarray(array).view(np.uint8).copy()
    for byte in 0, 7, words.size - 1:
        words.reshape(-1)[byte] ^= 4
        assert sum_of(jnp.asarray(words.view(array.dtype))) != sum_
        words.reshape(-1)[byte] ^= 4
    moved = [
        array[::-1],
        array[:, ::-1],
        array[..., ::-1],
        array.reshape(6, 4, 5).swapaxes(0, 1),
        array[jnp.array([1, 0, 2, 3])],
    ]
    assert len({sum_, *map(sum_of, moved)}) == 6
    assert {as_earlier(sum_of(x)) for x in moved} == {as_earlier(sum_)}  # what earlier versions wrote
    assert is_same(sum_, sum_) and is_same(as_earlier(sum_), sum_) and not is_same(sum_ ^ 1 << 40, sum_)
    ones, halves = jnp.ones((4, 6), dtype), jnp.ones((4, 6), dtype).at[2:].set(0)
    assert len(set(map(sum_of, (ones, halves, jnp.zeros_like(ones), ones[:0], ones[0, 0])))) == 5


def sum_of(array) -> int:
    return checksums({"a": array})["a"]


def test_checksums_of_large_arrays():
    """Of more words than have anything in common counted: equal changes in pairs."""
    array = np.full((3, 2**19), 0.5, np.float32)
    array[0, :70_000] = np.arange(70_000)
    changes = [array.copy() for _ in range(4)]
    changes[0][1, :100_000] = 0  # an even number of words
    changes[1][:, : 2**18], changes[1][:, 2**18 :] = array[:, 2**18 :], array[:, : 2**18]
    for i, bit in ((2, 31), (3, 30)):
        changes[i].view(np.uint32)[2, [5, 70_001]] ^= np.uint32(1 << bit)
    assert len({sum_of(jnp.asarray(x)) for x in (array, *changes)}) == 5
    assert len({as_earlier(sum_of(jnp.asarray(x))) for x in (array, *changes)}) == 1


def test_a_run_goes_on_from_the_older_one(tiny_run, tmp_path, capsys):
    """To the parameters that it had before."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    damage_truncated(run / "checkpoints" / "40")
    train(tiny.config(run))
    said = capsys.readouterr().out
    assert "checkpoints/40: the checkpoint is damaged: " in said and "resuming, at step 30 of 40" in said
    jax.tree.map(np.testing.assert_array_equal, params(run), params(tiny_run))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["30", "40", "40.damaged"]
    assert load_run(run).step == 40
