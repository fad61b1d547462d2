"""Disks that fail, permissions that are missing, file systems that are away: one line and a status, and nothing is
taken for damaged, put aside or passed over that could only not be read. Every call of the system is made to fail."""

from collections.abc import Callable, Iterator
import errno
import os
from pathlib import Path
import random
import re
import shutil

import pytest

from tests.checkpoint.test_checkpoint import resume, save
from tests.helpers.faults import Call, Child
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.workdir import checkpointed_steps
from voco_jax.errors import UserError

BEGIN = """
import contextlib
from pathlib import Path
import jax
import numpy as np
from tests.helpers import tiny
from tests.checkpoint.test_checkpoint import config, resume, save, state
from voco_jax.checkpoint import checkpointer as checkpoint
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.train.loop import train
checkpoint._PAUSES = (0.01, 0.05, 0.2)
def read(run):
    step, params = Checkpointer(run).restore_params(jax.eval_shape(state))[:2]
    jax.tree.map(np.testing.assert_array_equal, params, state(step))
    return step
def go_on(run):
    restored = resume(run)
    jax.tree.map(np.testing.assert_array_equal, restored.params, state(restored.step))
    return restored.step
def write(run, step):
    with contextlib.closing(Checkpointer(run, create=True, config=config())) as checkpointer:
        whole = False
        while not whole:
            checkpointer.save(step, state(step), {"m": state(-step % 97)}, {"batches": step})
            whole = checkpointer.wait()
"""
WRITES = int(os.environ.get("VOCO_JAX_OUTAGES", "20"))  # kinds of calls that fail while writing; there are about 140
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
MENDED = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENOMEM, errno.EROFS, errno.ENOSPC)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child(BEGIN)
    yield child
    child.close()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def below(run: Path, number: int, kind: Callable[[Call], bool] = lambda call: True) -> Callable[[Call], int]:
    """A rule: calls for a run's files fail."""
    return lambda call: number if call.path.startswith(str(run)) and kind(call) else 0


@pytest.mark.parametrize("what", [pytest.param("go_on", marks=pytest.mark.slow), "read"])
def test_what_cannot_be_read_is_not_damaged(child, tmp_path, what):
    """Each of the calls that reading makes fails in turn: the newest is read all the same, or nothing is."""
    save(tmp_path, 1, 2)
    expression = f"{what}(Path({str(tmp_path)!r}))"
    assert child.evaluate(expression) == (2, "", 0)
    calls = sorted({call for call in child.calls if call.path.startswith(str(tmp_path))})
    assert {call.name for call in calls} >= {"open", "read", "list", "stat"}
    rng, refused = random.Random(what), 0
    for i, call in enumerate(calls):
        number = rng.choice(PASSING if i % 2 else MENDED)
        value, text, status = child.evaluate(expression, below(tmp_path, number, lambda c: c == call))  # noqa: B023
        assert names(tmp_path) == ["1", "2"], (call, number, value, text)
        if value != 2:
            assert (value, status) == (("TryAgain", 75) if number in PASSING else ("UserError", 2)), (call, text)
            assert os.strerror(number) in text and "\n" not in text
            refused += 1
    assert refused > len(calls) / 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_what_is_damaged_and_cannot_be_put_aside(child, tmp_path, number):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / "run" / "metadata").write_text("{}")
    rule = below(tmp_path, number, lambda call: call.name == "rename")
    value, text, status = child.evaluate(f"go_on(Path({str(tmp_path)!r}))", rule)
    assert (value, status) == (("UserError", 2) if number == errno.EACCES else ("TryAgain", 75))
    line = (
        f"{tmp_path}/checkpoints/2: the checkpoint is damaged, and cannot be renamed 2.damaged: {os.strerror(number)}"
    )
    assert text == line and names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "params/_METADATA", "params/manifest.ocdbt", "run/metadata"])
def test_a_pipe_in_a_checkpoint(tmp_path, file):
    """It is not waited for, and not taken for damage."""
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "2" / file
    path.unlink()
    os.mkfifo(path)
    for read in resume, lambda run: Checkpointer(run).newest(Checkpointer(run).stored):
        with pytest.raises(UserError, match=f"checkpoints/2/{file}: expected a file, found a pipe$"):
            read(tmp_path)
    assert names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(
    "place", ["checkpoints", "checkpoints/2", "checkpoints/2/params", "checkpoints/2/run/metadata"]
)
def test_an_archive_that_is_not_mounted(tmp_path, place):
    """A link to it is neither damage nor nothing: no older step is taken, and nothing put aside."""
    save(tmp_path / "run", 1, 2)
    path = tmp_path / "run" / place
    path.rename(tmp_path / "archive")
    path.symlink_to(tmp_path / "archive")
    read = Checkpointer(tmp_path / "run").steps
    assert read() == [2, 1] and checkpointed_steps(tmp_path / "run") and resume(tmp_path / "run").step == 2
    (tmp_path / "archive").rename(tmp_path / "unmounted")
    line = f"/{place}: a link to {tmp_path}/archive, which is not there; is it mounted\\?$"
    calls = [lambda run: Checkpointer(run).newest(Checkpointer(run).about), resume]
    for call in calls + [checkpointed_steps] * (place in ("checkpoints", "checkpoints/2")):
        with pytest.raises(UserError, match=line):
            call(tmp_path / "run")
    (tmp_path / "unmounted").rename(tmp_path / "archive")
    assert names(tmp_path / "run") == ["1", "2"] and resume(tmp_path / "run").step == 2


def test_an_older_checkpoint_that_is_not_mounted(tmp_path):
    """The newest is read without it."""
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    (tmp_path / "checkpoints" / "1").symlink_to(tmp_path / "archive")
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.newest(lambda step: (step, checkpointer.about(step)))[0] == 2
    with pytest.raises(UserError, match="checkpoints/1: a link to .*, which is not there; is it mounted\\?$"):
        checkpointer.about(1)


@pytest.mark.slow
def test_writing_while_the_disk_fails(child, tmp_path):
    """Each of the calls that a save makes fails in turn, for good, or twice: what was there before stays."""
    save(tmp_path / "first", 1)
    run, rng, ended = tmp_path / "run", random.Random(0), {"TryAgain": 0, "UserError": 0, None: 0}
    assert child.evaluate(f"write(Path({str(run)!r}), 1)") == (None, "", 0)
    plain = [Call(call.name, _plain(call.path)) for call in child.calls if call.path.startswith(str(run))]
    kinds = sorted(set(plain))
    assert {call.name for call in kinds} >= {"open", "write", "fsync", "rename", "mkdir"}
    for step, kind in enumerate(rng.sample(kinds, min(WRITES, len(kinds))), start=2):
        passing = rng.random() < 0.7
        number, times = rng.choice(PASSING if passing else MENDED), rng.choice((1, 2, 1000))

        def rule(call: Call) -> int:
            fails = Call(call.name, _plain(call.path)) == kind and child.failed < times  # noqa: B023
            return number if fails else 0  # noqa: B023

        before = child.evaluate(f"Checkpointer(Path({str(run)!r})).steps()")[0]
        value, text, status = child.evaluate(f"write(Path({str(run)!r}), {step})", rule)
        assert (value, status) in ((None, 0), ("TryAgain", 75), ("UserError", 2)), (kind, number, text)
        at_start = not kind.path.startswith(f"{run}/checkpoints/N.")  # when what is there is looked at
        assert status != 75 or passing and (times > 2 or at_start), (kind, number, times, text)
        after = child.evaluate(f"go_on(Path({str(run)!r}))")
        assert after[0] == (step if value is None else before[0]) or value and after[0] == step, (kind, number, after)
        assert "Traceback" not in child.said()
        ended[value] += 1
    assert min(ended.values()) > 0


def test_what_cannot_be_deleted(child, tmp_path):
    """An older checkpoint, where a newer one has been written: that is said, and no failure of the save."""
    save(tmp_path, 1, 2)
    rule = below(tmp_path / "checkpoints" / "1", errno.EACCES, lambda call: call.name in ("list", "remove"))
    assert child.evaluate(f"write(Path({str(tmp_path)!r}), 3)", rule) == (None, "", 0)
    assert child.failed and names(tmp_path) == ["1", "2", "3"]
    assert child.said() == f"{tmp_path}/checkpoints: an older checkpoint cannot be deleted: Permission denied\n"
    assert child.evaluate(f"write(Path({str(tmp_path)!r}), 4)") == (None, "", 0)
    assert names(tmp_path) == ["3", "4"]


@pytest.mark.multiprocess
def test_training_outlasts_an_outage(child, tmp_path):
    """One that goes on and on ends it with the status on which it is started again."""
    run = tmp_path / "run"
    changes = "train__steps=6, train__checkpoint_every=2, train__keep=9, train__tensorboard=False"
    failed: list[str] = []

    def rule(call: Call) -> int:
        step = re.search("/checkpoints/(2|6).orbax.*/params.orbax-checkpoint-tmp$", call.path)
        if step and call.name == "mkdir" and (step[1] == "6" or len(failed) < 2):
            failed.append(step[1])
            return errno.ESTALE
        return 0

    value, text, status = child.evaluate(f"train(tiny.config(Path({str(run)!r}), {changes}))", rule)
    line = f"{run}/checkpoints/6: the checkpoint cannot be written: Stale file handle"
    assert (value, text, status) == ("TryAgain", line, 75)
    assert failed == ["2"] * 2 + ["6"] * 4
    assert [name for name in names(run) if name.isdecimal()] == ["2", "4"]
    said = child.said()
    assert said.count("; the one before is kept, and the next attempt made in ") == 5 and "Traceback" not in said


def _plain(path: str) -> str:
    """Without what is another each time: steps, and the names of data files."""
    return re.sub("checkpoints/[0-9]+", "checkpoints/N", re.sub("[0-9a-f]{32}", "H", path))
