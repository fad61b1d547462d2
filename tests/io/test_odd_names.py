"""Directories as people call them: what is written under any name is there to be read, under that name and no other."""

import os
from pathlib import Path
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.checkpoint.test_checkpoint import resume, save, state
from tests.helpers import tiny
from tests.train.test_training import params
from voco_jax.convert.jax_checkpoint import Parameter, of_newest, write_checkpoint
from voco_jax.errors import UserError
from voco_jax.io import paths as storage
from voco_jax.io.paths import matching, plain_path

NAMES = [
    "plain", "[", "]", "[a]", "[!a]", "a[0-9]", "*", "**", "?", "\\", "a\\b", "{a,b}", " ", "with space", "'\"`$HOME`",
    "two\nlines\ttab", "\x01\x7f", "日本 e\u0301 😀", "-", "--step=1", "%", "%5B#1", "a:b,c;d|e&f", "gs:", "file:", "~",
    "...", "x" * 255, "a.orbax-checkpoint-tmp", "ocdbt.process_0", "7",
]  # fmt: skip


@pytest.mark.slow
def test_every_name(tmp_path):
    for name in NAMES:
        run = tmp_path / name / "run"
        save(run, 1, 2, keep=1)
        restored = resume(run)
        assert restored.step == 2, name
        jax.tree.map(np.testing.assert_array_equal, restored.params, state(2))
        assert os.listdir(run / "checkpoints") == ["2"], name
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)  # and nothing beside


def test_neighbours(tmp_path):
    """A name that is a pattern of another's: each has its own arrays."""
    for i, name in enumerate(["ab", "a*", "a?", "[a]b"], 1):
        save(tmp_path / name, i)
    for i, name in enumerate(["ab", "a*", "a?", "[a]b"], 1):
        jax.tree.map(np.testing.assert_array_equal, resume(tmp_path / name).params, state(i))


def test_what_was_written_is_read_before_the_older_one_goes(tmp_path, monkeypatch):
    """Under its own name Orbax would leave a checkpoint without its arrays, and say nothing."""
    run = tmp_path / "[a]"
    save(run, 1)
    monkeypatch.setattr("voco_jax.io.paths.plain_path", lambda directory: directory)
    with pytest.raises(UserError) as error:
        save(run, 2, keep=1)
    assert str(error.value).startswith(f"{run}/checkpoints/2: the checkpoint cannot be written: "), error.value
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert resume(run).step == 1
    for _ in range(1000):  # Orbax tidies up beside
        if os.listdir(run / "checkpoints") == ["1"]:
            return
        time.sleep(0.01)
    raise AssertionError(os.listdir(run / "checkpoints"))


def test_a_converted_run(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for name in "[a]", "b\\c", "%20", "#":
        run = tmp_path / name / "run"
        kernel = Parameter((2, 3, 4), values.dtype, True, lambda i: values[i])
        write_checkpoint(run, {"layers": {"kernel": kernel}}, None, id)
        np.testing.assert_array_equal(of_newest(run, lambda stored: stored).read("layers.kernel", 1), values[1])
    assert sorted(os.listdir(tmp_path)) == ["#", "%20", "[a]", "b\\c"]


def test_plain_path(tmp_path, monkeypatch):
    assert plain_path(tmp_path) == tmp_path
    assert plain_path(Path("/s3/runs")) != Path("/s3/runs")  # which epath takes for a bucket
    odd = tmp_path / "[odd]"
    odd.mkdir()
    (plain_path(odd) / "file").touch()
    assert os.listdir(odd) == ["file"] and plain_path(odd) == plain_path(odd)
    monkeypatch.setattr(storage, "_directory_of_links", lambda: type("", (), {"name": "/tmp/[x]"}))
    with pytest.raises(UserError, match="TMPDIR of a plain name"):
        plain_path(tmp_path / "[other]")


def test_patterns_below_odd_directories(tmp_path):
    directory = tmp_path / "[1]*"
    (directory / "below").mkdir(parents=True)
    for name in "a.png", "b.png", "below/c.png":
        (directory / name).touch()
    assert matching(directory / "*.png") == [directory / "a.png", directory / "b.png"]
    assert matching(directory / "**" / "*.png")[-1] == directory / "below" / "c.png"
    assert matching(tmp_path / "*" / "a.png") == [directory / "a.png"]
    assert matching(tmp_path / "none" / "*") == []


@pytest.mark.multiprocess
def test_a_training(tiny_run, tmp_path):
    """By the command, to the parameters that it has under a plain name."""
    run = tmp_path / "my [run] \\ 100% 'a*b' é" / "--x=1"
    done = subprocess.run(
        [sys.executable, "-m", "voco_jax.train", *tiny.arguments(run)],
        capture_output=True, text=True, cwd=tiny.CONFIG_FILE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    jax.tree.map(np.testing.assert_array_equal, params(run), params(tiny_run))
    assert sorted(os.listdir(tmp_path)) == [run.parent.name]
