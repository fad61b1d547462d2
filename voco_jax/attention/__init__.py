"""Attention kernels behind one interface, chosen by name.

An adapter is a module with two functions, `causal(q, k, v, segment_ids)` for training and prefill and
`cached(q, k, v, lengths)` for decoding (see `xla.py`, the adapter for any platform). Both streams of the model need
nothing else: the compress stream is causal attention over images as batch, the read stream causal attention inside
segments. An adapter that cannot honour a request raises; nothing falls back.
"""

from voco_jax.attention import xla

ADAPTERS = {"xla": xla}


def get_adapter(name: str):
    """The adapter of that name; ValueError names those there are."""
    if name not in ADAPTERS:
        raise ValueError(f"attention {name!r} is unknown; there are: {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[name]
