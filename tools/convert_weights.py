#!/usr/bin/env python
"""`voco convert`, also `python -m voco_jax.convert`, under its first name."""

from voco_jax.convert.__main__ import main

if __name__ == "__main__":
    main()
