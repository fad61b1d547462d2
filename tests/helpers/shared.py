"""What tests only read is made once, whichever of pytest-xdist's workers asks for it first."""

from collections.abc import Callable
import fcntl
import os
from pathlib import Path
import shutil

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory of the session that `make` has filled, in one process; the others wait for it. Nobody may write
    into it afterwards."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # that all workers share
    directory, made = base / "shared" / name, base / "shared" / f"{name}.made"
    directory.parent.mkdir(exist_ok=True)
    with open(directory.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a process that failed
            make(directory)
            made.touch()
    return directory
