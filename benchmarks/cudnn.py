"""Is attention 'cudnn' right on this GPU? Outputs and gradients in bfloat16, beside 'xla', against float32.

    python -m benchmarks.cudnn

A line a layout: the distance |x - exact| / |exact| of the output and of dq, dk and dv, for both kernels. The status is
1 where cuDNN's is more than twice xla's (and 0.6 %). Without a GPU it compares xla with itself, to try the script.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.attention import cudnn, xla

# (what, rows, length, heads, key-value heads, head size); an image's segment is 581 tokens at K = 2, 580 at K = 1
LAYOUTS = (
    ("packed", 2, 250, 4, 2, 64),
    ("packed", 2, 101, 4, 2, 64),
    ("packed", 2, 581, 4, 4, 128),
    ("packed", 2, 1408, 32, 4, 64),
    ("plain", 1, 69, 4, 1, 128),
    ("plain", 1, 101, 4, 2, 64),
    ("plain", 8, 580, 32, 32, 128),
    ("plain", 8, 581, 32, 32, 128),
    ("plain", 8, 583, 32, 8, 128),
)


def dense(q, k, v, visible):
    """softmax(q · kᵀ / √H) v in float32, of visible [R, T, T]."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    exact = functools.partial(jnp.einsum, precision="highest")
    scores = exact("rinh,rjnh->rnij", q, k) / np.sqrt(q.shape[-1])
    return exact("rnij,rjnh->rinh", jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf)), v)


def outputs_and_gradients(attend, qkv, weight):
    """[output, dq, dk, dv], float64, for a loss that is the output's product with `weight`."""

    @jax.jit
    def run(qkv, weight):
        output, backward = jax.vjp(attend, *qkv)
        return output, *backward(weight.astype(output.dtype))

    return [np.asarray(x, np.float64) for x in run(qkv, weight)]


def compare(what: str, rows: int, length: int, heads: int, kv_heads: int, size: int) -> bool:
    """Print a layout's line; whether cuDNN is right."""
    rng = np.random.default_rng(0)
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, weight = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    ids = np.zeros((rows, length), np.int32)
    if what == "packed":
        for row in ids:
            row[:] = np.searchsorted(np.sort(rng.choice(length, 4, replace=False)), np.arange(length), side="right")
    visible = jnp.asarray((ids[:, :, None] == ids[:, None, :]) & np.tri(length, dtype=bool))
    exact = outputs_and_gradients(lambda *x: dense(*x, visible), [x.astype(jnp.float32) for x in qkv], weight)
    segment_ids = ids if what == "packed" else None
    distances = []
    for adapter in (cudnn if jax.default_backend() == "gpu" else xla, xla):
        found = outputs_and_gradients(functools.partial(adapter.causal, segment_ids=segment_ids), qkv, weight)
        distances.append([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, exact, strict=True)])
    right = all(a <= 2 * max(b, 3e-3) for a, b in zip(*distances, strict=True))
    told = "  ".join(f"{a:.1e}/{b:.1e}" for a, b in zip(*distances, strict=True))
    print(f"{what:7} {rows} × {length:5}, {heads:2} and {kv_heads:2} heads of {size:3}   {told}   {right}", flush=True)
    return right


def main() -> None:
    device = jax.devices()[0]
    first = "cudnn" if device.platform == "gpu" else "xla"
    print(f"{device.device_kind}: {first}/xla against float32, of the output, dq, dk, dv")
    results = [compare(*layout) for layout in LAYOUTS]
    print(f"{sum(results)} of {len(results)} layouts are right")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
