"""The estimate of a compiled step against what is known by hand; nothing here runs on a TPU."""

from functools import partial
import math
import re

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp
import pytest

from voco_jax.aot import hlo
from voco_jax.aot.hlo_cost import estimate, group_size, shorten
from voco_jax.aot.hlo_flops import matmul_flops
from voco_jax.errors import UserError
from voco_jax.parallel.chips import CHIPS, parse_topology

V5E = CHIPS["v5e"]
P = jax.sharding.PartitionSpec

# As libtpu prints it, shortened: a loop whose bound comes from outside, a fused matmul, and a copy in the loop.
LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=4

FileNames
1 "/home/someone/model.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=17 end_line=17 column=17 end_column=17}

StackFrames
7 {file_location_id=1 parent_frame_id=1}

%fused (p0: bf16[256,512], p1: bf16[512,512]) -> bf16[256,512] {
  %p0 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[256,512]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (p: (s32[], bf16[256,512], bf16[512,512], /*index=3*/s32[])) -> (s32[], bf16[256,512], bf16[512,512], s32[]) {
  %p = (s32[]{:T(128)}, bf16[256,512]{1,0}, bf16[512,512]{1,0}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[512,512]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %n = s32[] get-tuple-element(%p), index=3
  %c2 = s32[] constant(2)
  %next = s32[]{:T(128)} add(%i, %c2)
  %dot = bf16[256,512]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused, METADATA
  %copy.1 = bf16[256,512]{0,1} copy(%dot), backend_config={"window_config":{"estimated_cycles":"900000"}}
  ROOT %t = (s32[], bf16[256,512], bf16[512,512], /*index=3*/s32[]) tuple(%next, %copy.1, %w, %n)
}

%condition (q: (s32[], bf16[256,512], bf16[512,512], s32[])) -> pred[] {
  %q = (s32[], bf16[256,512]{1,0}, bf16[512,512]{1,0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] get-tuple-element(%q), index=3
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (a: bf16[256,512], b: bf16[512,512]) -> bf16[256,512] {
  %a = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[] constant(1)
  %limit = s32[] constant(10)
  %init = (s32[], bf16[256,512], bf16[512,512], s32[]) tuple(%start, %a, %b, %limit)
  %loop = (s32[], bf16[256,512], bf16[512,512], s32[]) while(%init), condition=%condition, body=%body
  ROOT %out = bf16[256,512]{1,0} get-tuple-element(%loop), index=1
}
""".replace(
    "METADATA",
    'metadata={op_name="jit(f)/jvp(Net)/while/body/closed_call/dot_general" stack_frame_id=7}, '
    'backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"3000","iteration_bounds":["1"]}}',
)


def test_a_loop_is_multiplied_out():
    cost = estimate(LOOP, V5E)  # 1, 3, 5, 7, 9: five turns
    assert cost.matmul_flops == 5 * 2 * 256 * 512 * 512
    assert cost.classes_a["matmul"] == pytest.approx(5 * 3000 / 1.5e9)
    assert cost.seconds_a == pytest.approx(5 * 903000 / 1.5e9)
    # B: the copy takes no longer than HBM needs to read and write it.
    assert cost.classes_b["the rest"] == pytest.approx(5 * 2 * 256 * 512 * 2 / 819e9)
    dearest, dot = cost.dearest
    assert (dearest.label, dearest.excess_seconds) == ("copy", pytest.approx(5 * 900000 / 1.5e9))
    assert (dot.label, dot.source) == ("fwd Net/dot_general", "model.py:17")
    assert dot.excess_seconds == pytest.approx(5 * (3000 - 2 * 256 * 512 * 512 / 131072) / 1.5e9)


def test_no_estimate_is_no_time():
    """The largest number of 64 bits stands where libtpu for tpu7x has none."""
    copy, matmul = 2 * 256 * 512 * 2 / 819e9, 2 * 256 * 512 * 512 / V5E.peak_flops
    cost = estimate(LOOP.replace('"900000"', '"9223372036854775807"'), V5E)
    assert cost.classes_a["the rest"] == cost.classes_b["the rest"] == pytest.approx(5 * copy)
    assert cost.classes_a["matmul"] == pytest.approx(5 * 3000 / 1.5e9)
    cost = estimate(LOOP.replace('"3000"', '"9223372036854775807"'), V5E)
    assert cost.classes_a["matmul"] == pytest.approx(5 * matmul, rel=0.003)


def test_a_computation_of_another_thread():
    """Its last line says which; what comes after it is still read."""
    text = LOOP.replace("dim_labels=bf_io->bf\n}", 'dim_labels=bf_io->bf\n}, execution_thread="sparsecore"', 1)
    assert hlo.parse(text).computations.keys() == hlo.parse(LOOP).computations.keys()


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("constant(10)", "constant(2)", 1),
        ("constant(10)", "constant(1)", 0),
        ("direction=LT", "direction=LE", 5),
        ("compare(%j, %bound), direction=LT", "compare(%bound, %j), direction=GT", 5),
        ("%next = s32[]{:T(128)} add(%i, %c2)", "%next = s32[]{:T(128)} multiply(%i, %c2)", 4),  # 1, 2, 4, 8
    ],
)
def test_bounds_are_read(old, new, turns):
    assert old in LOOP
    assert estimate(LOOP.replace(old, new), V5E).matmul_flops == turns * 2 * 256 * 512 * 512


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("%limit = s32[] constant(10)", "%limit = s32[] reduce(%a, %start), to_apply=%f", "reduce limit"),
        ("add(%i, %c2)", "subtract(%i, %c2)", "does not end"),
    ],
)
def test_an_unreadable_bound_raises(old, new, why, monkeypatch):
    monkeypatch.setattr(hlo, "MAX_TURNS", 100)
    with pytest.raises(hlo.HLOError, match=f"loop loop .*bound cannot be read: .*{why}"):
        estimate(LOOP.replace(old, new), V5E)


@pytest.mark.parametrize(
    ("lhs", "rhs", "result", "attributes", "multiply_adds"),
    [
        ("[8,16]", "[16,32]", "[8,32]", "dim_labels=bf_io->bf", 8 * 16 * 32),
        # a contraction over two dimensions; a batch as a window that meets one element of the padded side at a place
        (
            "[2,8,4,16]",
            "[2,16,32,1]",
            "[4,8,32,1]",
            "window={size=2x1}, dim_labels=0b1f_0io1->1bf0",
            2 * 4 * 8 * 16 * 32,
        ),
        (
            "[6,16,1]",
            "[5,16,32]",
            "[5,6,32]",
            "window={size=5 pad=4_4 rhs_reversal=1}, dim_labels=bf0_0io->0bf",
            5 * 6 * 16 * 32,
        ),
        ("[1,4,3]", "[3,3,7]", "[1,4,7]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (3 + 4 + 3) * 3 * 7),
        ("[1,4,3]", "[2,3,7]", "[1,7,7]", "window={size=2 pad=0_0 lhs_dilate=2}, dim_labels=b0f_0io->b0f", 7 * 3 * 7),
        ("[1,336,3]", "[14,3,7]", "[1,24,7]", "window={size=14 stride=14}, dim_labels=b0f_0io->b0f", 336 * 3 * 7),
    ],
)
def test_flops_of_convolutions(lhs, rhs, result, attributes, multiply_adds):
    text = f"""ENTRY %e (a: f32[1]) -> f32[1] {{
  %a = bf16{lhs} parameter(0)
  %b = bf16{rhs} parameter(1)
  ROOT %c = bf16{result} convolution(%a, %b), {attributes}
}}"""
    entry = hlo.parse(text).entry
    assert matmul_flops(entry.root, entry) == 2 * multiply_adds


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,4]<=[4,4]T(1,0)", 4),
        ("mesh['data'=2,'fsdp'=8] {'fsdp'}", 8),
        ("mesh['data'=2,'fsdp'=8] {'data','fsdp':(2)4}", 8),
        ("{}", 64),
    ],
)
def test_sizes_of_groups(groups, n):
    instruction = hlo.Instruction(
        "x", "all-gather", "f32[8]", (), "", f", channel_id=1, replica_groups={groups}, d={{0}}"
    )
    assert group_size(instruction, 64) == n


def test_an_asynchronous_collective_counts_once():
    """libtpu repeats it in every fusion that overlaps with it."""
    gather = "all-gather(%p), channel_id=14, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"

    def fusion(name: str, flag: str, tail: str) -> str:
        return f"""%{name} (p: bf16[64,128]) -> bf16[256,128] {{
  %p = bf16[64,128] parameter(0)
  %g = bf16[256,128] {gather}"async_collective_fusion_config":{{"flag_start":"{flag}","flag_end":"8"}}}}
  ROOT %r = bf16[256,128] custom-call(%g), custom_call_target="{tail}"
}}
"""

    text = (
        fusion("first", "-1", "AsyncCollectiveStart")
        + fusion("middle", "2", "Other")
        + fusion("last", "-1", "AsyncCollectiveDone")
        + """ENTRY %e (a: bf16[64,128]) -> bf16[256,128] {
  %a = bf16[64,128] parameter(0)
  %s = bf16[256,128] fusion(%a), kind=kCustom, calls=%first
  %m = bf16[256,128] fusion(%a), kind=kOutput, calls=%middle
  ROOT %d = bf16[256,128] fusion(%a), kind=kCustom, calls=%last
}"""
    )
    (gathered,) = estimate(text, V5E).collectives
    assert (gathered.kind, gathered.count, gathered.bytes) == ("all-gather", 1, 3 * 64 * 128 * 2)
    assert gathered.seconds > gathered.exposed_seconds == 0
    (alone,) = estimate(text.replace("AsyncCollectiveStart", "Other"), V5E).collectives
    assert alone.exposed_seconds == alone.seconds == gathered.seconds


def test_a_collective_that_the_sparsecores_run():
    """As libtpu prints it for tpu7x, shortened; the other cores work on meanwhile."""
    text = """%called (p: bf16[256,2048], t: token[]) -> bf16[2048,2048] {
  %t = token[] parameter(1)
  %p = bf16[256,2048]{1,0:T(16,128)(2,1)} parameter(0)
  ROOT %g = bf16[2048,2048] all-gather(%p), channel_id=4, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}
}, execution_thread="sparsecore"

ENTRY %e (a: bf16[256,2048]) -> bf16[2048,2048] {
  %a = bf16[256,2048]{1,0:T(16,128)(2,1)} parameter(0)
  %b = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %c = token[] custom-call(%b), custom_call_target="PrepareAsyncCallDone"
  %s = ((bf16[256,2048], token[]), bf16[2048,2048]) call-start(%a, %c), to_apply=%called
  ROOT %d = bf16[2048,2048] call-done(%s)
}"""
    cost = estimate(text, CHIPS["tpu7x"])
    (gathered,) = cost.collectives
    assert (gathered.kind, gathered.count, gathered.bytes) == ("all-gather", 1, 7 * 256 * 2048 * 2)
    assert (gathered.seconds, gathered.exposed_seconds) == (gathered.bytes / 600e9, 0)
    assert not cost.left_out and not cost.copied_bytes


@pytest.mark.parametrize(
    ("kind", "result", "sent"),
    [
        ("all-gather", "[256,128]", 3),
        ("reduce-scatter", "[16,128]", 3 / 4),
        ("all-reduce", "[64,128]", 2 * 3 / 4),
        ("all-to-all", "[64,128]", 3 / 4),
        ("collective-permute", "[64,128]", 1),
    ],
)
def test_what_a_device_sends_around_a_ring_of_four(kind, result, sent):
    text = f"""ENTRY %e (a: f32[64,128]) -> f32{result} {{
  %a = f32[64,128] parameter(0)
  ROOT %c = f32{result} {kind}(%a), channel_id=1, replica_groups=[4,4]<=[16]
}}"""
    (collective,) = estimate(text, V5E).collectives
    assert (collective.kind, collective.bytes) == (kind, sent * 64 * 128 * 4)
    assert collective.seconds == collective.exposed_seconds == collective.bytes / V5E.ici_bandwidth


def test_asynchronous_copies_count_what_is_moved_and_no_cycles():
    text = """ENTRY %e (a: f32[64,128]) -> f32[16,128] {
  %a = f32[64,128] parameter(0)
  %s = ((f32[64,128]), f32[16,128]{1,0:S(1)}, s32[]) slice-start(%a), slice={[0:16], [0:128]}
  %p = f32[16,128]{1,0:S(1)} slice-done(%s)
  %c = (f32[16,128], f32[16,128]{1,0:S(1)}, u32[]) copy-start(%p)
  ROOT %d = f32[16,128] copy-done(%c)
}"""
    cost = estimate(text, V5E)
    assert cost.copied_bytes == 2 * 16 * 128 * 4 and cost.copied_seconds == cost.copied_bytes / V5E.hbm_bandwidth
    assert cost.seconds_a == 0 and not cost.left_out


def test_an_update_in_place_moves_the_update():
    """B: what a fusion writes of a large array, and what it reads of a sliced one."""
    text = """%fused (p0: f32[64,128], p1: f32[64,128], p2: s32[]) -> f32[64,128] {
  %p0 = f32[64,128] parameter(0)
  %p1 = f32[64,128] parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[2,128] dynamic-slice(%p1, %p2, %zero), dynamic_slice_sizes={2,128}
  ROOT %u = f32[64,128] dynamic-update-slice(%p0, %row, %p2, %zero)
}
ENTRY %e (a: f32[64,128], b: f32[64,128], i: s32[]) -> f32[64,128] {
  %a = f32[64,128] parameter(0)
  %b = f32[64,128] parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[64,128] fusion(%a, %b, %i), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"900000"}
}"""
    index = 4  # bytes
    moved = 2 * 2 * 128 * 4 + index
    assert estimate(text, V5E).seconds_b == pytest.approx(moved / V5E.hbm_bandwidth)


def test_names_are_short():
    assert (
        shorten("jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/dot")
        == "bwd remat dot"
    )
    assert shorten("jit(step)/jvp()/shard_map/splash_f3x512x512_b3x512x512/vmap(f)/mul") == "fwd splash/mul"
    assert shorten("convert.19") == "convert"
    assert shorten("jit(step)/jvp(VoCo)/while/body/closed_call/cond/branch_1_fun/mul") == "fwd VoCo/mul"


@pytest.mark.parametrize("name", ["v5e", "v5e:8", "v5e:2x2x2", "v9:2x2", "v5p:4x4", "tpu7x:2x2", "v5e:0x4"])
def test_a_topology_that_is_none(name):
    with pytest.raises(UserError, match="--topology: expected a chip of v5e, v5p, v6e, tpu7x and a shape, .*; found"):
        parse_topology(name)


def cost_of(function, mesh, *arguments):
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arguments).compile().as_text()
    cost = estimate(text, V5E)
    # Every collective in the text is counted somewhere.
    assert len(set(re.findall(r"channel_id=(\d+)", text))) <= sum(c.count for c in cost.collectives)
    return cost


@pytest.mark.tpu_compile
def test_scanned_nested_and_differentiated(tpu_mesh):
    def loss(w, x):
        def layer(x, w):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

    cost = cost_of(jax.grad(loss, argnums=(0, 1)), tpu_mesh, ((5, 256, 256), P()), ((4 * 512, 256), P("fsdp")))
    assert cost.matmul_flops == 3 * 5 * 3 * 2 * 512 * 256 * 256  # forward, dw, dx
    peak = cost.matmul_flops / V5E.peak_flops
    assert peak < cost.classes_a["matmul"] < 10 * peak  # small, and yet no trip count forgotten
    assert cost.seconds_b <= cost.seconds_a


@pytest.mark.tpu_compile
def test_the_dearest_branch_and_collectives(tpu_mesh):
    def body(i, x, w):  # which branch is taken cannot be told when compiling
        return jax.lax.cond(x[0, 0] > i, lambda x: jnp.tanh(x @ w), lambda x: x + 1, x)

    def step(x, w):
        @partial(jax.shard_map, in_specs=(P("fsdp"), P("fsdp")), out_specs=P("fsdp"), check_vma=False)
        def each(x, w):
            w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            x = jax.lax.fori_loop(0, 8, lambda i, x: body(i, x, w), x)
            return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)

        return each(x, w)

    arguments = ((4 * 512, 1024), P("fsdp")), ((1024, 1024), P("fsdp"))
    cost = cost_of(step, tpu_mesh, *arguments)
    assert cost.matmul_flops == 8 * 2 * 512 * 1024 * 1024
    sent = {collective.kind: (collective.count, collective.bytes) for collective in cost.collectives}
    assert sent == {"all-gather": (1, 3 / 4 * 1024 * 1024 * 2), "reduce-scatter": (1, 3 / 4 * 512 * 1024 * 2)}
    assert cost.collective_seconds == pytest.approx(sum(bytes for _, bytes in sent.values()) / 200e9)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("fused", [False, True])
def test_splash_attention(tpu_mesh, fused):
    heads, length, head_dim, block = 2, 512, 128, 256
    sizes = {f"block_{name}": block for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")}
    if not fused:
        sizes |= {"block_q_dq": block, "block_kv_dq": block}
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
        head_shards=1,
        q_seq_shards=1,
    )

    def attention(q, k, v):
        @partial(jax.shard_map, in_specs=(P("fsdp"),) * 3, out_specs=P("fsdp"), check_vma=False)
        def each(q, k, v):
            with jax.named_scope("splash_f3x256x256_b3x256x256"):  # of 2 × 2 blocks, one lies in the future
                return jax.vmap(kernel)(q, k, v)

        return each(q, k, v).astype(jnp.float32).sum()

    shape = ((4 * 3, heads, length, head_dim), P("fsdp"))
    cost = cost_of(jax.grad(attention, argnums=(0, 1, 2)), tpu_mesh, *[shape] * 3)
    matmuls = 2 + (5 if fused else 3 + 4)
    assert cost.attention_flops == 3 * heads * 3 * matmuls * 2 * block * block * head_dim
    assert cost.attention_seconds == pytest.approx(cost.attention_flops / V5E.peak_flops, rel=0.01)
    assert cost.seconds_a > cost.attention_seconds == cost.classes_b["attention"]
    assert not any("tpu_custom_call" in name for name in cost.left_out)
    assert math.isfinite(cost.seconds_b)
