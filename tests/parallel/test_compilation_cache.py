"""Compiled programs on disk. Each check is a process of its own, as commands are: jax opens its cache once."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from tests.helpers import tiny

COUNT_HITS = """
import sys, atexit, jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[1]))
atexit.register(lambda: print("hits", events.count("cache_hits"), "misses", events.count("cache_misses")))
"""
PROGRAM = f"""{COUNT_HITS}
import jax.numpy as jnp
from voco_jax.parallel.compilation_cache import use_compilation_cache
use_compilation_cache(*sys.argv[1:])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(7.0)))
"""


def start(home: Path, program: str, *arguments, **environment) -> subprocess.Popen:
    kept = {key: value for key, value in os.environ.items() if "CACHE" not in key}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "HOME": str(home), **environment},
    )


def run(home: Path, *arguments, program: str = PROGRAM, **environment) -> tuple[str, str, int, int]:
    """(standard output, standard error, programs loaded, programs compiled and kept)."""
    process = start(home, program, *arguments, **environment)
    out, error = process.communicate()
    assert process.returncode == 0, error
    *lines, counts = out.splitlines()
    _, hits, _, misses = counts.split()
    return "\n".join(lines), error, int(hits), int(misses)


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*-cache"))


def test_the_next_process_loads_what_one_compiled(tmp_path):
    first, error, hits, misses = run(tmp_path)
    assert error == "" and hits == 0 and misses > 0
    directory = tmp_path / ".cache/voco_jax/compiled"
    assert len(entries(directory)) == misses and directory.stat().st_mode & 0o777 == 0o700
    assert run(tmp_path) == (first, "", misses, 0)
    for entry in entries(directory):  # cut off, it is compiled again
        entry.write_bytes(entry.read_bytes()[:-20])
    again, error, hits, _ = run(tmp_path)
    assert again == first and hits == 0 and "Traceback" not in error


def test_processes_that_begin_together(tmp_path):
    processes = [start(tmp_path, PROGRAM) for _ in range(3)]
    outputs = [process.communicate()[0].splitlines()[0] for process in processes]
    assert len({*outputs}) == 1 and all(process.returncode == 0 for process in processes)
    assert run(tmp_path)[3] == 0


def test_what_jax_is_told_comes_first(tmp_path):
    home, other, own = tmp_path / "home", tmp_path / "other", tmp_path / "own"
    assert run(home, JAX_COMPILATION_CACHE_DIR=str(other))[3] == len(entries(other)) > 0
    assert run(home, JAX_ENABLE_COMPILATION_CACHE="0")[2:] == (0, 0)
    assert run(home, "")[2:] == (0, 0)
    assert run(home, own)[3] == len(entries(own)) > 0
    assert not home.exists()


def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    out, error, hits, misses = run(tmp_path)
    assert error == (
        "note: ~/.cache/voco_jax/compiled: compiled programs cannot be kept there: Not a directory; "
        "JAX_COMPILATION_CACHE_DIR names another directory\n"
    )
    assert (hits, misses) == (0, 0) and out


@pytest.mark.multiprocess
def test_the_second_ask_compiles_nothing(tmp_path, tiny_run, picture):
    ask = f"{COUNT_HITS}\nfrom voco_jax.ask import main\nmain()"
    arguments = ["--run", tiny_run, "--image", picture, "what is it?"]
    minimum = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first, _, _, misses = run(tmp_path, *arguments, program=ask, **minimum)
    again, error, hits, missed = run(tmp_path, *arguments, program=ask, **minimum)
    assert misses > 0 and (again, hits, missed) == (first, misses, 0), error


@pytest.mark.multiprocess
def test_training_keeps_its_programs_where_the_config_says_and_computes_the_same(tmp_path):
    train = f"{COUNT_HITS}\nfrom voco_jax.train.__main__ import main\nmain()"
    steps = dict(train__steps=2, optim__warmup_steps=1, train__log_every=1)
    found, losses = {}, set()
    for name, directory in ("first", tmp_path / "compiled"), ("again", tmp_path / "compiled"), ("without", ""):
        arguments = tiny.arguments(tmp_path / name, compilation_cache=directory, **steps)
        *_, hits, misses = run(tmp_path, *arguments, program=train, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        found[name] = hits, misses
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.add(tuple((line["loss"], line["grad_norm"]) for line in lines))
    assert found == {
        "first": (0, len(entries(tmp_path / "compiled"))),
        "again": (found["first"][1], 0),
        "without": (0, 0),
    }
    assert len(losses) == 1 and len(next(iter(losses))) == 2 and found["first"][1] > 0
