#!/usr/bin/env python
"""`voco make-video-questions` from a checkout."""

from voco_jax.data.make_video_questions import main

if __name__ == "__main__":
    main()
