"""VoCo-LLaMA in JAX: vision-language models that compress an image into a few tokens of their own.

`models/voco.py` is where to begin reading; `train`, `evaluate` and `ask` are the commands (`python -m voco_jax.…`).
"""
