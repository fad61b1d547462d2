#!/usr/bin/env python
"""`voco check-logits` from a checkout."""

from voco_jax.convert.check_logits import main

if __name__ == "__main__":
    main()
