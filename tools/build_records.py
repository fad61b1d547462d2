#!/usr/bin/env python
"""`voco build-records` from a checkout."""

from voco_jax.data.shards.__main__ import main

if __name__ == "__main__":
    main()
