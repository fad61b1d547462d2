"""`voco`, from a checkout and from the built wheel, installed far from it."""

import importlib
import importlib.metadata
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest

from tests.helpers import tiny
from voco_jax.__main__ import COMMANDS, help_text

ROOT = Path(__file__).parents[1]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "cwd": ROOT} | options
    return subprocess.run(list(map(str, arguments)), **options)


def test_commands_are_listed_and_the_nearest_is_named():
    voco = (sys.executable, "-m", "voco_jax")
    assert run(*voco).stdout == run(*voco, "--help").stdout == help_text() + "\n"
    assert all(f"  {name} " in help_text() for name in COMMANDS)
    assert run(*voco, "--version").stdout == f"voco_jax {importlib.metadata.version('voco_jax')}\n"
    wrong = run(*voco, "trian", "--config=easyvqa")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: 'trian' is not a command of voco; did you mean 'voco train'?\n"
    assert "voco --help lists the commands" in run(*voco, "x").stderr


def test_help_imports_nothing_that_takes_time():
    told = run(sys.executable, "-X", "importtime", "-m", "voco_jax", "--help").stderr
    assert "voco_jax.interrupts" in told and not re.search(r"\| +(numpy|jax|absl)$", told, re.M)


def test_every_command_of_the_package_is_listed():
    files = (ROOT / "voco_jax").rglob("*.py")
    found = [file.relative_to(ROOT) for file in files if "@one_line_errors\ndef main" in file.read_text()]
    listed = {module.partition(":")[0] for module, _ in COMMANDS.values()}
    assert listed == {".".join(file.with_suffix("").parts) for file in found}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_there(name):
    module, function = COMMANDS[name][0].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("spelling", [["-m", "voco_jax", "check-logits"], ["tools/check_logits.py"]])
def test_old_and_new_spellings(spelling):
    done = run(sys.executable, *spelling, "--help")
    assert done.returncode == 0 and "--golden" in done.stdout
    usage = "voco check-logits" if len(spelling) == 3 else "check_logits.py"
    assert done.stdout.startswith(f"usage: {usage} ")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("voco_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # By way of the sdist. Without isolation: what builds it is here, and nothing is fetched
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    assert built.returncode == 0, built.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.slow
def test_what_the_wheel_carries(wheel):
    found = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"voco_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "voco_jax").rglob("*.py")}
    assert configs | modules == {name for name in found if name.endswith(".py")}
    assert any(name.endswith("licenses/LICENSE") for name in found)


@pytest.mark.slow
def test_the_installed_wheel_in_an_empty_directory(wheel, tmp_path, picture):
    """Train by a config's name, ask the run, and see a tool's help: far from the checkout, which is not on the path."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    assert run(*pip).returncode == 0
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(site)}

    def voco(*arguments) -> subprocess.CompletedProcess:
        return run(sys.executable, site / "bin" / "voco", *arguments, cwd=empty, env=environment)

    module = "import voco_jax.configs.video_7b as found; print(found.__file__)"
    where = run(sys.executable, "-c", module, cwd=empty, env=environment).stdout.strip()
    assert where == str(site / "voco_jax" / "configs" / "video_7b.py")
    arguments = [a for a in tiny.arguments("run", train__steps=4) if not a.startswith("--config=")]
    trained = voco("train", "--config=easyvqa", *arguments)
    assert trained.returncode == 0, trained.stderr
    assert "trained: run\n" in trained.stdout
    asked = voco("ask", "--run", "run", "--image", picture, "is there a circle?")
    assert asked.returncode == 0 and asked.stdout.startswith("is there a circle?\n  "), asked.stderr
    assert voco("convert", "--help").stdout.startswith("usage: voco convert ")


@pytest.mark.parametrize("lines", [1, 20000])
def test_nobody_reads_on(lines):
    """As in `voco … | head`: the status of commands that end so, and not a word. In little output the end finds it."""
    script = f"from voco_jax.errors import one_line_errors; one_line_errors(lambda: print('a line\\n' * {lines}))()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
