"""Every attention adapter against dense attention written from the formula, on the same random layouts."""

import functools
import os
import re
import subprocess
import sys
import types

import jax
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp
import numpy as np
import pytest

from voco_jax import attention
from voco_jax.attention import cudnn, splash, xla


def dense(q, k, v, visible):
    """softmax(q·kᵀ / √H) v, of [R, T, N, H] and [R, T, G, H]; visible [R, T, T], whose empty rows give zeros."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("rinh,rjnh->rnij", q, k) / np.sqrt(q.shape[-1])
    weights = jnp.where(visible[:, None], jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    return jnp.einsum("rnij,rjnh->rinh", weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30), v)


def packed(rng, rows, length):
    """Segment ids [R, T] of random lengths with padding (0) at the end; the last row is nothing but padding."""
    ids = np.zeros((rows, length), np.int32)
    for row in ids[:-1]:
        cuts = np.sort(rng.choice(np.arange(1, length), 4, replace=False))
        row[: cuts[-1]] = 1 + np.searchsorted(cuts, np.arange(cuts[-1]), side="right")
    return ids


def visible_in(ids):
    return (ids[:, :, None] == ids[:, None, :]) & np.tri(ids.shape[1], dtype=bool)


def random_inputs(rng, rows, length, heads, kv_heads, size):
    shapes = [(rows, length, heads, size), *[(rows, length, kv_heads, size)] * 2, (rows, length, heads, size)]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def compare(attend, inputs, visible, read=None):
    """Outputs and all gradients of `attend` are the oracle's, ≤ 1e-4, and finite; `read`: places that anybody reads."""
    *qkv, weight = inputs
    if read is not None:
        weight = weight * read[..., None, None]

    @jax.jit
    def outputs_and_gradients(*qkv):
        def run(function):
            outputs, gradients = jax.vjp(function, *qkv)
            return outputs, *gradients(weight)

        return run(attend), run(lambda q, k, v: dense(q, k, v, visible))

    found, expected = jax.device_get(outputs_and_gradients(*qkv))
    assert all(np.isfinite(x).all() for x in found)
    if read is not None:
        found, expected = ((x[0] * read[..., None, None], *x[1:]) for x in (found, expected))
    for name, x, y in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=0, err_msg=name)
    assert max(abs(x).max() for x in found) > 0.5


HEADS = [(4, 2, 64), (4, 1, 128), (4, 4, 64)]


@pytest.mark.parametrize("adapter", [xla, splash])
@pytest.mark.parametrize("heads", HEADS)
def test_causal_in_packed_rows(adapter, heads):
    rng = np.random.default_rng(0)
    ids = packed(rng, 2, 250)
    compare(functools.partial(adapter.causal, segment_ids=ids), random_inputs(rng, 2, 250, *heads), visible_in(ids))


@pytest.mark.parametrize("adapter", [xla, splash])
@pytest.mark.parametrize("length, before", [(128, 256), (150, 70), (300, 900)])
def test_causal_after_other_keys(adapter, length, before):
    """Segments see the keys before the row that are theirs, and some of these nobody sees."""
    rng = np.random.default_rng(0)
    ids, before_ids = packed(rng, 2, length), rng.integers(-1, 4, (2, before)).astype(np.int32)
    q, _, _, weight = random_inputs(rng, 2, length, 4, 2, 64)
    _, k, v, _ = random_inputs(rng, 2, before + length, 4, 2, 64)
    all_ids = np.concatenate([before_ids, ids], axis=1)
    visible = (ids[:, :, None] == all_ids[:, None]) & (
        np.arange(before + length) <= np.arange(length)[:, None] + before
    )

    def attend(q, k, v):
        return adapter.causal_after(q, k[:, before:], v[:, before:], ids, k[:, :before], v[:, :before], before_ids)

    compare(attend, (q, k, v, weight), visible)


@pytest.mark.parametrize("length", [128, 100])
def test_splash_without_segments(length):
    inputs = random_inputs(np.random.default_rng(0), 1, length, 4, 2, 64)
    compare(splash.causal, inputs, visible_in(np.zeros((1, length))))


# Chunk 100 in 370 places: blocks (one of 384²) hold several segments, and padding is shorter than a segment; chunk 600
# in 1,280 places: blocks smaller than a segment, some never visited, kernels for dq and for dk, dv.
@pytest.mark.parametrize("adapter", [xla, splash])
@pytest.mark.parametrize("length, chunk, heads", [(370, 100, (4, 2, 64)), (1280, 600, (2, 1, 64))])
def test_chunked_rows_with_padding(adapter, length, chunk, heads):
    inputs = random_inputs(np.random.default_rng(0), 1, length, *heads)
    ids = np.arange(length)[None] // chunk
    read = np.arange(length)[None] < length // chunk * chunk
    compare(functools.partial(adapter.chunked, chunk=chunk), inputs, visible_in(ids), read)


# ---- Where, and in which blocks ----------------------------------------------------------------------------------

MESHES = """
import jax
import numpy as np
from tests.attention.test_attention import compare, packed, random_inputs, visible_in
from voco_jax.attention import splash

axes = ("data", "fsdp", "frame", "tensor")
P = jax.sharding.PartitionSpec
rng = np.random.default_rng(0)
for shape, size in (((2, 1, 2, 2), 64), ((1, 2, 2, 2), 128), ((2, 2, 1, 2), 64)):
    mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        rows = 4
        ids = packed(rng, rows, 256)
        inputs = random_inputs(rng, rows, 256, 4, 2, size)
        place = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, P(*spec)))
        heads = [place(x, ("data", "fsdp"), None, "tensor") for x in inputs]
        compare(lambda q, k, v: splash.causal(q, k, v, place(ids, ("data", "fsdp"))), heads, visible_in(ids))

        visible = np.concatenate([np.zeros((rows, 256, 256), bool), visible_in(ids)], axis=2)
        visible[:, :, :256] = ids[:, :, None] == ids[:, None, ::-1]
        twice = [inputs[0], *(np.concatenate([x[:, ::-1], x], axis=1) for x in inputs[1:3]), inputs[3]]
        heads = [place(x, ("data", "fsdp"), None, "tensor") for x in twice]
        before = lambda *x: [y[:, :256] for y in x]
        after = lambda q, k, v: splash.causal_after(q, k[:, 256:], v[:, 256:], ids, *before(k, v), ids[:, ::-1])
        compare(after, heads, visible)

        chunks = np.arange(256)[None] // 100
        heads = [place(x, ("data", "fsdp", "frame"), None, "tensor") for x in inputs]
        read = np.broadcast_to(chunks < 2, (rows, 256))
        compare(lambda q, k, v: splash.chunked(q, k, v, 100), heads, visible_in(chunks), read)
    print(shape)

# The last mesh again: rows of images that come unsharded leave on all eight devices, two heads of four each.
with jax.set_mesh(mesh):
    out = jax.jit(lambda *x: splash.chunked(*x, 100))(*(jax.device_get(x) for x in inputs[:3]))
    assert {s.data.shape for s in out.addressable_shards} == {(1, 256, 2, 64)}
"""


@pytest.mark.multiprocess
def test_splash_sharded_over_every_axis_of_eight_devices():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", MESHES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3


AXES = ("data", "fsdp", "frame", "tensor")


def described_mesh(platform: str, kind: str, shape: tuple[int, ...] = (1, 2, 1, 2)):
    """Enough to trace and lower for devices that this machine does not have."""
    sharding = jax.sharding
    device = sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = sharding.AbstractMesh(shape, AXES, axis_types=(sharding.AxisType.Auto,) * 4, abstract_device=device)
    return sharding.use_abstract_mesh(mesh)


def shaped(rows=2, length=512, heads=4, kv_heads=2, size=128, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((rows, length, heads, size), dtype)
    kv = jax.ShapeDtypeStruct((rows, length, kv_heads, size), dtype)
    return q, kv, kv


def lowered_gradient(attend, arguments, platform) -> str:
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.square(attend(q, k, v).astype(jnp.float32)).sum(), (0, 1, 2)))
    return gradient.trace(*arguments).lower(lowering_platforms=(platform,)).as_text(debug_info=True)


def test_splash_lowers_to_mosaic_kernels_whose_scope_says_what_they_visit():
    with described_mesh("tpu", "TPU v5 lite"):
        text = lowered_gradient(functools.partial(splash.chunked, chunk=580), shaped(length=4096), "tpu")
    assert text.count("custom_call @tpu_custom_call") == 3  # forward, dq, and dk with dv
    assert set(re.findall(r"splash_f\w+", text)) == {"splash_f15x512x512_b15x512x512"}


def test_remat_that_keeps_context_does_not_run_the_kernel_again():
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("context"))
    def attend(q, k, v):
        return splash.causal(q, k, v)

    with described_mesh("tpu", "TPU v5 lite"):
        kept, again = (lowered_gradient(f, shaped(), "tpu") for f in (attend, jax.checkpoint(splash.causal)))
    assert kept.count("custom_call @tpu_custom_call") == 2
    assert again.count("custom_call @tpu_custom_call") == 3


CUDNN = types.SimpleNamespace(cudnn_get_version=lambda: 91000)  # all that lowering asks of the library


@pytest.mark.parametrize(
    "segment_ids, kernel", [(None, "fmhaSoftmax"), (np.zeros((2, 512), np.int32), "fmhaScaleBiasSoftmax")]
)
def test_cudnn_lowers_to_causal_fused_attention(segment_ids, kernel, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", CUDNN)
    with described_mesh("gpu", "NVIDIA H100 80GB HBM3"):
        text = lowered_gradient(functools.partial(cudnn.causal, segment_ids=segment_ids), shaped(), "cuda")
    assert set(re.findall(r"custom_call @(__cudnn\$\w+)", text)) == {f"__cudnn${kernel}", f"__cudnn${kernel}Backward"}
    assert set(re.findall(r"mask_type\W+22: \W+22(\w+?)\\", text)) == {"CAUSAL"}


def chunks_of(chunk):
    return lambda adapter: functools.partial(adapter.chunked, chunk=chunk)


def causal(adapter):
    return adapter.causal


TPU, GPU = ("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    "adapter, attend, mesh, inputs, message",
    [
        (splash, chunks_of(600), TPU, {}, "a row of 512 places does not hold a segment of 600 tokens"),
        (splash, causal, TPU, dict(length=32768), "less than 32768 places, found 32768"),
        (splash, causal, TPU, dict(rows=3), r"3 rows do not divide over mesh axes data, fsdp \(2 shards\)"),
        (splash, causal, TPU, dict(kv_heads=1), "4 heads with 1 key-value heads do not divide over mesh.tensor = 2"),
        (splash, causal, TPU, dict(kv_heads=3), "multiple of the 3 key-value heads, found 4 heads"),
        (splash, causal, GPU, {}, "needs a TPU .*, found platform 'gpu'"),
        (xla, chunks_of(600), TPU, {}, "a row of 512 places does not hold a segment of 600 tokens"),
        (cudnn, causal, TPU, {}, "needs an NVIDIA GPU, found platform 'tpu'"),
        (cudnn, causal, GPU, dict(dtype=jnp.float32), "in bfloat16 or float16, found float32: set model.dtype"),
        (cudnn, causal, GPU, dict(size=36), "multiple of 8 dimensions, found 36"),
    ],
)
def test_what_an_adapter_cannot_honour_raises(adapter, attend, mesh, inputs, message):
    with described_mesh(*mesh), pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(attend(adapter), *shaped(**inputs))
    assert "\n" not in str(error.value)


# BOS, 576 patches, two tokens and two VoCo tokens are 581; 69 and 101 are small models'.
@pytest.mark.parametrize("length", [69, 101, 581])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_row_of_odd_length_is_computed_by_a_kernel_for_even_ones(length, is_packed):
    def even(q, k, v, segment_ids):
        assert q.shape[1] % 2 == k.shape[1] % 2 == v.shape[1] % 2 == 0
        return xla.causal(q, k, v, segment_ids)

    rng = np.random.default_rng(0)
    ids = packed(rng, 2, length) if is_packed else None
    attend = functools.partial(cudnn.evenly(even), segment_ids=ids)
    visible = visible_in(np.zeros((2, length)) if ids is None else ids)
    compare(attend, random_inputs(rng, 2, length, 4, 2, 32), visible)


@pytest.mark.parametrize("length", [69, 101, 581])
@pytest.mark.parametrize("is_packed", [True, False])
def test_cudnn_is_given_even_lengths_alone(length, is_packed, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", CUDNN)
    ids = np.zeros((2, length), np.int32) if is_packed else None
    with described_mesh(*GPU):
        text = lowered_gradient(functools.partial(cudnn.causal, segment_ids=ids), shaped(length=length), "cuda")
        chunked = lowered_gradient(functools.partial(cudnn.chunked, chunk=length), shaped(length=length), "cuda")
    for lowered in (text, chunked):
        calls = [line for line in lowered.splitlines() if "custom_call @__cudnn" in line]
        assert len(calls) == 2 and all(f"x{length + 1}x" in call and f"x{length}x" not in call for call in calls)


@pytest.mark.parametrize("length, before", [(69, 31), (100, 70)])
def test_cudnn_after_other_keys_is_given_even_lengths(length, before, monkeypatch):
    """And with these an exact kernel gives what the odd ones ask for."""
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", CUDNN)
    ids, before_ids = np.ones((2, length), np.int32), np.ones((2, before), np.int32)

    def attend(q, k, v):
        return cudnn.causal_after(q, k[:, before:], v[:, before:], ids, k[:, :before], v[:, :before], before_ids)

    q, k, v = shaped(length=length)[0], *shaped(length=before + length)[1:3]
    with described_mesh(*GPU):
        text = lowered_gradient(attend, (q, k, v), "cuda")
    calls = [line for line in text.splitlines() if "custom_call @__cudnn" in line]
    padded = length + length % 2, before + before % 2 + length + length % 2
    assert len(calls) == 2 and all(f"x{places}x" in call for call in calls for places in padded)

    def exact(q, k, v, mask):
        assert (q.shape[1], k.shape[1]) == padded
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    monkeypatch.setattr(cudnn, "_check_request", lambda q: None)
    monkeypatch.setattr(cudnn, "_masked", exact)
    rng = np.random.default_rng(0)
    q, _, _, weight = random_inputs(rng, 2, length, 4, 2, 32)
    _, k, v, _ = random_inputs(rng, 2, before + length, 4, 2, 32)
    visible = np.tri(length, before + length, before, dtype=bool) * np.ones((2, 1, 1), bool)
    compare(attend, (q, k, v, weight), visible)


def test_what_cudnn_refuses_is_one_line_at_set_up(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", CUDNN)
    shapes = dict(heads=4, kv_heads=2, dtype="bfloat16", segment_length=581, row_length=840, training=True)
    with described_mesh(*GPU, (1, 1, 1, 1)):
        for size, reason in ((36, "multiple of 8 dimensions, found 36"), (264, "head dim must be <= ")):
            with pytest.raises(ValueError, match=f"compress stream, 581 tokens.*{reason}.*'xla'") as error:
                cudnn.check(size=size, **shapes)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^attention: 'cudnn' needs an NVIDIA GPU, found platform 'cpu'; [^;]*$"):
        cudnn.check(size=64, **shapes | dict(segment_length=0))
    # The kernel that reads images whole too: here the others are taken for granted
    monkeypatch.setattr(cudnn, "causal", lambda q, k, v, segment_ids: q)
    with described_mesh(*GPU, (1, 1, 1, 1)):
        cudnn.check(size=36, **shapes)
        with pytest.raises(ValueError, match="whole images, 840 tokens after 1162, 4 and 2 heads of 36 .*found 36; "):
            cudnn.check(size=36, **shapes, before_length=1162)


def test_decoding_is_xlas_in_every_adapter():
    assert {adapter.cached for adapter in attention.ADAPTERS.values()} == {xla.cached}


@pytest.mark.parametrize(
    "length, chunk, expected",
    [
        (2048, None, ((1024, 1024), 3, (1024, 1024), 3, True)),
        (4096, 580, ((512, 512), 15, (512, 512), 15, False)),
        (640, 580, ((640, 640), 1, (640, 640), 1, True)),
        (768, 707, ((768, 768), 1, (768, 768), 1, True)),
        (2176, None, ((128, 128), 153, (128, 128), 153, True)),  # 17 · 128 has no larger divisor
    ],
)
def test_blocks(length, chunk, expected):
    assert splash.choose_blocks(length, chunk) == expected


def test_rows_that_the_kernel_is_given_longer():
    assert [splash.padded_length(length, None) for length in (100, 2048, 2176)] == [128, 2048, 2304]
    assert [splash.padded_length(length, 580) for length in (584, 4096, 4736)] == [640, 4096, 5120]


def test_visits_are_the_blocks_with_a_visible_pair():
    for chunk, q, kv in ((100, 256, 384), (580, 128, 768), (768, 384, 128)):
        visible = visible_in(np.arange(768)[None] // chunk)[0].reshape(768 // q, q, 768 // kv, kv).any((1, 3))
        assert splash._visits(768, chunk, q, kv) == visible.sum(1).tolist()
        assert splash._visits(768, chunk, q, kv, by_keys=True) == visible.sum(0).tolist()


@pytest.mark.parametrize(
    "segments, chunk, expected",
    [(7, 580, (7, 4096)), (14, 580, (7, 4096)), (2, 580, (1, 584)), (8, 580, (8, 4736)), (3, 20, (3, 64))],
)
def test_rows_of_images(segments, chunk, expected):
    assert splash.row_shape(segments, chunk) == expected
    assert xla.row_shape(segments, chunk) == cudnn.row_shape(segments, chunk) == (1, chunk)


def test_a_kernel_that_is_only_interpreted_says_so():
    """It computes the same as any, many times slower."""
    assert "attention 'splash' is only interpreted on a CPU" in attention.interpreted("splash")
    assert not attention.interpreted("xla")
