"""Signals at moments at which Python's own way ends in a stack trace or a crash: a line and a status, nothing else."""

import gc
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import tiny
from voco_jax import interrupts
from voco_jax.interrupts import _module

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 75}
LINE = {signal.SIGINT: "interrupted", signal.SIGTERM: "preempted: nothing to save; the same command goes on"}


def told(command: list, sent: signal.Signals, moment: str, **environment) -> None:
    """Start a command, send it a signal when it has said what belongs to a moment, and see how it ends."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=tiny.CONFIG_FILE.parents[1], env=dict(os.environ, PYTHONUNBUFFERED="1", **environment),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    try:
        for line in process.stdout:
            if re.search(moment, line):
                process.send_signal(sent)
                break
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == STATUS[sent], rest
    assert re.match(rf"{LINE[sent]}(: |$)", rest.splitlines()[-1])  # a training says how to go on
    assert "Traceback" not in rest


@pytest.mark.parametrize("place", ["while garbage is collected", "in __del__"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_where_python_ignores_exceptions(monkeypatch, place, sent):
    """As jax's callback of the garbage collector: what a handler raises there is printed, and the work goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}

    def interrupt(*_):
        os.kill(os.getpid(), sent)
        time.sleep(0.01)  # the handler runs here

    class Ending:
        def __del__(self):
            interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "_at_once", dict.fromkeys(STATUS, False))
        signal.signal(signal.SIGINT, interrupts.on_signal)
        interrupts.exit_on_sigterm()
        try:
            with pytest.raises((KeyboardInterrupt, SystemExit)) as raised:
                if place == "in __del__":
                    Ending()
                else:
                    gc.callbacks.append(interrupt)
                    gc.collect()
                time.sleep(2)
        finally:
            if interrupt in gc.callbacks:
                gc.callbacks.remove(interrupt)
            for number, handler in before.items():
                signal.signal(number, handler)
    assert raised.type is (KeyboardInterrupt if sent == signal.SIGINT else SystemExit)
    assert sent == signal.SIGINT or raised.value.code == 143


@pytest.mark.multiprocess
@pytest.mark.parametrize("sent", STATUS)
@pytest.mark.parametrize("command", [["voco_jax.train"], ["voco_jax", "train"]])
def test_while_a_training_imports(tmp_path, sent, command):
    told(["-X", "importtime", "-m", *command, *tiny.arguments(tmp_path / "run")], sent, r"\| +numpy$")
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("sent", STATUS)
def test_while_a_training_compiles(tmp_path, sent):
    arguments = tiny.arguments(tmp_path / "run", train__tensorboard=False)
    told(["-m", "voco_jax.train", *arguments], sent, r"Compiling jit\(step\)", JAX_LOG_COMPILES="1")
    assert not os.listdir(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("command", ["ask", "evaluate", "compress", "chat", "memory", "tools/convert_weights.py"])
def test_while_a_command_imports(command):
    name = [command] if command.startswith("tools/") else ["-m", f"voco_jax.{command}"]
    told(["-X", "importtime", *name], signal.SIGINT, r"\| +voco_jax$")


def test_programs_of_others_keep_their_signals(tmp_path):
    """`python -m mine` imports the package while Python looks for the module, as the commands do."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import voco_jax\n")
    (tmp_path / "mine" / "__main__.py").write_text("from voco_jax import interrupts\nprint(interrupts.listening())\n")
    found = {}
    for arguments in (["-m", "mine"], ["-mmine", "voco_jax.ask"]):
        path = os.pathsep.join([str(tmp_path), str(tiny.CONFIG_FILE.parents[1])])
        done = subprocess.run(
            [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        found[arguments[0]] = done.stdout
    assert found == {"-m": "False\n", "-mmine": "False\n"}
    assert _module(["-m"], ["python", "-X", "dev", "-m", "voco_jax.train"]) == "voco_jax.train"
    assert _module(["-m", "a", "-m"], ["python", "-mvoco_jax.ask", "a", "-m"]) == "voco_jax.ask"
    assert _module(["ask.py"], ["python", "ask.py"]) == ""


def test_a_line_that_cannot_be_made_is_a_shorter_one(monkeypatch):
    monkeypatch.setitem(interrupts._LINE, signal.SIGINT, lambda: os.listdir("/is/not/there"))
    assert interrupts.interrupted().startswith("interrupted (FileNotFoundError: ")


SCRIPT = """
import hashlib, os, signal, sys, threading, time
from voco_jax import interrupts
interrupts.listen()
interrupts._GRACE = 0.5
from voco_jax.errors import one_line_errors

@one_line_errors
def main(kind):
    interrupts.set_interrupt_line(lambda: "interrupted in " + kind)
    try:
        if kind == "C++":  # which a signal does not interrupt; from here, for it must not come before
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        print("now", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        if kind == "tidying up, twice":
            print("now", flush=True)
            time.sleep(60)
        print("tidied up", flush=True)
        raise

main(sys.argv[1])
"""


@pytest.mark.parametrize("kind", ["Python", "C++", "tidying up, twice"])
def test_in_the_middle_of_a_command(kind):
    """It tidies up, unless it is in C++ for longer than anybody waits, or told a second time."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        for _ in range({"Python": 1, "C++": 0, "tidying up, twice": 2}[kind]):
            assert process.stdout.readline() == "now\n"
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output == ("tidied up\n" if kind == "Python" else "") and errors == f"interrupted in {kind}\n"
