"""Splash attention: JAX's block-sparse kernel for TPUs, interpreted (slowly) on CPU so that it can be tested there.

Both streams are causal attention inside pieces of a row, so most blocks of queries × keys hold no visible pair, and
the kernel never visits them. Which blocks, of what size, is decided here, from the shape alone: `choose_blocks` for a
row, `row_shape` for how many images share one.
"""

from functools import cache
from typing import NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
import jax.numpy as jnp
import numpy as np

from voco_jax.attention.platform import platform
from voco_jax.attention.windows import Window, binding, refuse
from voco_jax.attention.xla import cached, check, full

__all__ = [
    "FUSED",
    "PLATFORM",
    "WINDOWS",
    "Blocks",
    "cached",
    "causal",
    "causal_after",
    "check",
    "choose_blocks",
    "chunked",
    "full",
    "row_shape",
]

PLATFORM: str | None = "tpu"
FUSED: bool = True
WINDOWS: bool = False

LANES = 128  # the kernel's rows and blocks come in multiples of it
SUBLANES = 8

# What the kernels cost on a v5e, in cycles, by the compiler's own schedule: instruction bundles for blocks of 128² to
# 1024² in bf16 (libtpu 0.0.42), 128 dimensions a head; 64 differ little, since a matrix unit has 128 rows. The backward
# kernels run at the matrix units' speed (5, 4 and 3 matmuls of 32 cycles); the forward one has a softmax to wait for.
TILE_CYCLES = {"forward": 98, "fused": 160, "dkv": 128, "dq": 97}  # for 128 queries × 128 keys of a visited block
STEP_CYCLES = 600  # for a step of the grid, visited or not: the schedule's 450 to 650; Pallas's guide gives 0.35 µs
HBM_BYTES_PER_CYCLE = 546  # 819 GB/s at 1.5 GHz
# A token of padding goes through a layer's matmuls for nothing: about 24·D² FLOPs, at 131,072 a cycle, over D / 128
# heads (this module counts cycles a head), for D = 4096. Narrower models pay less for it; the choice hardly moves.
TOKEN_CYCLES = 24 * 4096 * 128 / 131_072
# What matrix products take longer for tokens that are no multiple of 128 (584 against 4,096, v5e, the same schedule).
RAGGED = 0.04


class Blocks(NamedTuple):
    """Blocks of queries × keys, forward and backward, and how many of them a head visits."""

    forward: tuple[int, int]
    forward_visits: int
    backward: tuple[int, int]
    backward_visits: int
    fused: bool

    @property
    def scope(self) -> str:
        """Says in the compiled program what its kernels do: they are custom calls, of which nothing else tells."""
        (fq, fk), (bq, bk) = self.forward, self.backward
        fused = "_fused" if self.fused else ""
        return f"splash_f{self.forward_visits}x{fq}x{fk}_b{self.backward_visits}x{bq}x{bk}{fused}"


# ---- The adapter's functions -----------------------------------------------------------------------------------


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None, window: Window | None = None
) -> jax.Array:
    """Causal attention inside segments. ValueError: a window, and what `_attend` refuses."""
    refuse("splash", window)
    return _attend(q, k, v, segment_ids, None, ("data", "fsdp"))


def causal_after(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array,
    before_k: jax.Array, before_v: jax.Array, before_ids: jax.Array,
) -> jax.Array:  # fmt: skip
    """Causal attention inside segments, after keys that stand before the row. ValueError: what `_attend` refuses."""
    length, num_before = q.shape[1], before_k.shape[1]
    if not num_before:
        return causal(q, k, v, segment_ids)
    places, before = (-(-size // LANES) * LANES for size in (length, num_before))
    _check_heads(q, k)
    kernel = _kernel_after(places, before, interpret=platform() == "cpu")

    def pad(x, axis, to, value=0):
        return jnp.pad(x, [(0, to - x.shape[axis] if i == axis else 0) for i in range(x.ndim)], constant_values=value)

    def attend(q, k, v, ids, before_k, before_v, before_ids):
        q = pad(jnp.swapaxes(q * q.shape[-1] ** -0.5, 1, 2), 2, places)
        k, v = (
            jnp.concatenate([pad(b, 1, before), pad(x, 1, places)], axis=1).swapaxes(1, 2)
            for b, x in ((before_k, k), (before_v, v))
        )
        ids, before_ids = pad(ids, 1, places), pad(before_ids, 1, before, value=-1)
        ids = kernels.SegmentIds(ids, jnp.concatenate([before_ids, ids], axis=1))
        with jax.named_scope(_blocks_after(places, before).scope):
            return jnp.swapaxes(jax.vmap(kernel)(q, k, v, ids)[:, :, :length], 1, 2)

    return _on_each_device(attend, ("data", "fsdp"), q, k, v, segment_ids, before_k, before_v, before_ids)


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int, window: int = 0) -> jax.Array:
    """Causal attention inside chunks of a row; padding is one more segment.

    ValueError: a window, C less than a segment, or what `_attend` refuses.
    """
    refuse("splash", binding(window, chunk))
    if (length := q.shape[1]) < chunk:
        raise ValueError(f"attention: 'splash': a row of {length} places does not hold a segment of {chunk} tokens")
    return _attend(q, k, v, None, chunk, ("data", "fsdp", "frame"))


@cache
def row_shape(num_segments: int, chunk: int) -> tuple[int, int]:
    """The layout with the fewest cycles, padding's matmuls and attention's blocks together.

    Several images share a row because one of, say, 580 tokens wastes 60 places of 640 and seven waste 36 of 4,096.
    Where their number does not allow it, a row ends at the next multiple of 8, the sublanes of a TPU's tiles, and is
    padded for the kernel alone.
    """

    def cycles_per_segment(layout):
        segments, length = layout
        places = padded_length(length, chunk)
        cycles = length * TOKEN_CYCLES + _forward_cycles(places, chunk, *choose_blocks(places, chunk).forward)
        if length % LANES:
            cycles += length * TOKEN_CYCLES * RAGGED
            cycles += (
                4 * 2 * places * LANES * 2 / HBM_BYTES_PER_CYCLE
            )  # q, k, v, output: read and written, 2 bytes each
        return cycles / segments

    layouts = []
    for segments in range(1, num_segments + 1):
        used = segments * chunk
        # A row that is a little longer may divide into larger blocks. Rows of 8,192 places waste next to nothing, and
        # the kernel's mask costs time at start-up that grows with the square.
        if num_segments % segments == 0 and (segments == 1 or used <= 8192):
            aligned = -(-used // LANES) * LANES
            lengths = (-(-used // SUBLANES) * SUBLANES, *range(aligned, aligned + 1024, LANES))
            layouts += [(segments, length) for length in lengths]
    return min(layouts, key=cycles_per_segment)


# ---- Which blocks ----------------------------------------------------------------------------------------------


@cache
def choose_blocks(length: int, chunk: int | None) -> Blocks:
    """The cheapest blocks for a row of `length` places (a multiple of 128) in segments of `chunk` (None: one segment).

    Large blocks run at the matrix units' full speed but cover more pairs that nobody may see; small ones pay the
    overhead of many steps. A side is a multiple of 128 that divides the length, at most 1024: four MiB of scores in
    fp32, of the 16 MiB of fast memory that a v5e allows a kernel.

    The backward pass is one kernel or two. One ("fused") computes scores once, five matmuls a block rather than
    seven, but writes a partial dq for every block of keys, visited or not, to be summed from HBM: it wins in rows of
    few blocks, loses in long rows of short segments. Its partial sums are rounded to the dtype of q.
    """
    chunk = chunk or length
    sides = [side for side in range(LANES, min(length, 1024) + 1, LANES) if length % side == 0]
    pairs = [(q, k) for q in sides for k in sides]
    forward = min(pairs, key=lambda pair: _forward_cycles(length, chunk, *pair))
    fused, backward = min(
        ((fused, pair) for fused in (True, False) for pair in pairs),
        key=lambda option: _backward_cycles(length, chunk, option[1][0], option[1][1], fused=option[0]),
    )
    return Blocks(
        forward, sum(_visits(length, chunk, *forward)), backward, sum(_visits(length, chunk, *backward)), fused
    )


@cache
def padded_length(length: int, chunk: int | None) -> int:
    """Places that the kernel is given for a row of `length`: a little more may divide into larger blocks."""
    shortest = -(-length // LANES) * LANES

    def cycles(length):
        blocks = choose_blocks(length, chunk)
        size = chunk or length
        return _forward_cycles(length, size, *blocks.forward) + _backward_cycles(
            length, size, *blocks.backward, fused=blocks.fused
        )

    return min(range(shortest, shortest + 1024, LANES), key=cycles)


def _visits(length: int, chunk: int, block_q: int, block_kv: int, by_keys: bool = False) -> list[int]:
    """Blocks with a visible pair, for each block of queries (or of keys)."""
    if by_keys:  # the same picture, seen from the other corner: keys are seen up to the end of their segment
        ends = [min((start + block_kv - 1) // chunk * chunk + chunk, length) for start in range(0, length, block_kv)]
        return [-(-end // block_q) - i * block_kv // block_q for i, end in enumerate(ends)]
    return [
        -(-(start + block_q) // block_kv) - start // chunk * chunk // block_kv for start in range(0, length, block_q)
    ]


def _steps(visits: list[int]) -> int:
    """The kernel's grid is as wide as its widest row."""
    return len(visits) * max(visits)


def _forward_cycles(length: int, chunk: int, block_q: int, block_kv: int) -> float:
    visits = _visits(length, chunk, block_q, block_kv)
    tiles = sum(visits) * block_q * block_kv / LANES**2
    return tiles * TILE_CYCLES["forward"] + _steps(visits) * STEP_CYCLES


def _backward_cycles(length: int, chunk: int, block_q: int, block_kv: int, fused: bool) -> float:
    visits = _visits(length, chunk, block_q, block_kv)
    tiles = sum(visits) * block_q * block_kv / LANES**2
    if fused:
        steps = (length // block_q) * (length // block_kv)
        read_again = steps * block_q * LANES * 2 / HBM_BYTES_PER_CYCLE  # writing them hides behind the matmuls
        return tiles * TILE_CYCLES["fused"] + steps * STEP_CYCLES + read_again
    steps = _steps(visits) + _steps(_visits(length, chunk, block_q, block_kv, by_keys=True))
    return tiles * (TILE_CYCLES["dkv"] + TILE_CYCLES["dq"]) + steps * STEP_CYCLES


# ---- The kernel ------------------------------------------------------------------------------------------------


class _Chunks(masks.ChunkedCausalMask):
    """ChunkedCausalMask whose every query carries its segment's first place along.

    The original divides by the chunk's length for every pair of a block, which makes the kernels 15 to 20 % longer by
    the compiler's schedule (v5e, 512² blocks); here a pair costs two comparisons.
    """

    def __init__(self, length: int, chunk: int):
        super().__init__((length, length), chunk)
        place = self.q_sequence
        self.q_sequence = place << 16 | place // chunk * chunk
        self.mask_function = lambda q, kv: (kv <= q >> 16) & (kv >= q & 0xFFFF)


@cache
def _kernel(length: int, chunk: int | None, interpret: bool) -> kernels.SplashAttentionKernel:
    """For any number of heads: all have the same mask."""
    if length >= 1 << 15:
        raise ValueError(f"attention: 'splash' takes rows of less than {1 << 15} places, found {length}")
    causal = masks.CausalMask((length, length)) if chunk is None else _Chunks(length, chunk)
    return _kernel_of(causal, choose_blocks(length, chunk), interpret)


@cache
def _kernel_after(length: int, before: int, interpret: bool) -> kernels.SplashAttentionKernel:
    """For queries of a row of `length` places that come after so many keys; both are multiples of 128."""
    mask = masks.CausalMask((length, before + length), offset=before)
    return _kernel_of(mask, _blocks_after(length, before), interpret)


@cache
def _blocks_after(length: int, before: int) -> Blocks:
    """Blocks of `causal_after`: as large as divides, up to 512 queries and 1024 keys. Nearly all are visited."""
    bq, bk = (
        max(side for side in range(LANES, most + 1, LANES) if size % side == 0)
        for size, most in ((length, 512), (before + length, 1024))
    )
    visits = sum(-(-(before + end) // bk) for end in range(bq, length + 1, bq))
    return Blocks((bq, bk), visits, (bq, bk), visits, fused=False)


def _kernel_of(mask: masks.Mask, blocks: Blocks, interpret: bool) -> kernels.SplashAttentionKernel:
    (bq, bk), (bq_back, bk_back) = blocks.forward, blocks.backward
    sizes = kernels.BlockSizes(
        block_q=bq,
        block_kv=bk,
        block_kv_compute=bk,
        block_q_dkv=bq_back,
        block_kv_dkv=bk_back,
        block_kv_dkv_compute=bk_back,
        block_q_dq=None if blocks.fused else bq_back,
        block_kv_dq=None if blocks.fused else bk_back,
        use_fused_bwd_kernel=blocks.fused,
    )
    # `make_splash_mha` would put the arrays that say which blocks to visit on a device of the ambient mesh, where
    # ahead-of-time compilation has none. As numpy arrays they are constants of whatever is being traced.
    of_heads = masks.MultiHeadMask([mask])
    forward, mask_function = mask_info.process_mask(of_heads, blocks.forward)
    dq = None if blocks.fused else mask_info.process_mask(of_heads, blocks.backward)[0]
    dkv, _ = mask_info.process_mask_dkv(of_heads, blocks.backward, shrink_grid=not blocks.fused)
    return kernels.SplashAttentionKernel(
        forward,
        dq,
        dkv,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="context",
        mask_function=mask_function,
        interpret=interpret,
    )


def _attend(q, k, v, segment_ids, chunk, row_axes: tuple[str, ...]) -> jax.Array:
    """The kernel over rows and heads, sharded as the ambient mesh says.

    Its output and the scores' logsumexp are named "context": a remat policy that keeps them need not run it again.
    ValueError: another platform than TPU and CPU; a mesh that does not divide rows or heads; heads that do not go
    into groups.
    """
    _check_heads(q, k)
    length = q.shape[1]
    places = padded_length(length, chunk)
    kernel = _kernel(places, chunk, interpret=platform() == "cpu")

    def pad(x, axis):  # what stands behind a row's end is in the future of its queries
        return jnp.pad(x, [(0, places - length if i == axis else 0) for i in range(x.ndim)])

    def attend(q, k, v, ids=None):
        rows = (pad(jnp.swapaxes(x, 1, 2), 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        if ids is not None:
            ids = kernels.SegmentIds(*(pad(ids, 1),) * 2)
        with jax.named_scope(choose_blocks(places, chunk).scope):
            return jnp.swapaxes(jax.vmap(kernel)(*rows, ids)[:, :, :length], 1, 2)

    arrays = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
    return _on_each_device(attend, row_axes, *arrays)


def _check_heads(q, k) -> None:
    if (found := platform()) not in ("tpu", "cpu"):
        raise ValueError(f"attention: 'splash' needs a TPU (or a CPU, to test), found platform {found!r}")
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"attention: 'splash' needs a multiple of the {kv_heads} key-value heads, found {heads} heads")


def _on_each_device(attend, row_axes: tuple[str, ...], q, k, *arrays) -> jax.Array:
    """`attend(q, k, *arrays)` on each device's rows and heads; arrays [R, ·] are of rows alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q, k, *arrays)
    heads, kv_heads = q.shape[2], k.shape[2]
    shards = int(np.prod([mesh.shape[axis] for axis in row_axes]))
    if len(q) % shards:
        raise ValueError(
            f"attention: 'splash': {len(q)} rows do not divide over mesh axes {', '.join(row_axes)} ({shards} shards)"
        )
    if heads % mesh.shape["tensor"] or kv_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"attention: 'splash': {heads} heads with {kv_heads} key-value heads do not divide over mesh.tensor = "
            f"{mesh.shape['tensor']}"
        )
    P = jax.sharding.PartitionSpec
    spec = P(row_axes, None, "tensor", None)
    # The kernel is a constant of the mapped function: every device gets all of its masks, as all heads share them.
    specs = tuple(spec if x.ndim == 4 else P(row_axes, None) for x in (q, k, *arrays))
    return jax.shard_map(attend, in_specs=specs, out_specs=spec, check_vma=False)(q, k, *arrays)
