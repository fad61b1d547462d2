"""`python -m voco_jax.data.preview`, as `python -m voco_jax.preview` was called."""

import runpy

if __name__ == "__main__":
    runpy.run_module("voco_jax.preview", run_name="__main__")
