"""Compiled programs are kept on disk, by jax's persistent compilation cache: the next process loads them."""

import os
from pathlib import Path
import sys

import jax

from voco_jax.errors import UserError
from voco_jax.io.paths import as_path
from voco_jax.terminal import printable

DIRECTORY = "~/.cache/voco_jax/compiled"
_MIN_SECONDS = 0.1  # programs that compile faster are not kept; jax's own 1 s would leave out most of a small model's


def use_compilation_cache(directory: str = DIRECTORY) -> None:
    """From here on, keep compiled programs in `directory`, and load those that are there.

    It is a path or gs://…; with '' programs are not kept.

    Settings of jax's own come first: JAX_COMPILATION_CACHE_DIR is another directory, JAX_ENABLE_COMPILATION_CACHE=0
    turns the cache off. A program's key has the versions of jax and XLA, the flags and the kind of device, a CPU's
    features included, so hosts may share a directory. Where it cannot be written, a line on standard error says so
    and programs are compiled as without it.
    """
    settings = jax.config.values
    if not directory or settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    try:
        path = as_path(directory)
        if isinstance(path, Path):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)  # who can write there can run code here
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "no permission to write")
    except (OSError, UserError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        if jax.process_index() == 0:
            hint = "JAX_COMPILATION_CACHE_DIR names another directory"
            line = f"note: {directory}: compiled programs cannot be kept there: {reason}; {hint}"
            print(printable(line), file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
