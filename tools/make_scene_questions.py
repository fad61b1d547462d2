#!/usr/bin/env python
"""`voco make-scene-questions` from a checkout."""

from voco_jax.data.make_scene_questions import main

if __name__ == "__main__":
    main()
