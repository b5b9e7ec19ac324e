"""Counting in compiled HLO: loops as often as they run, matmuls of every kind, collectives by their groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from readme_jax.plan import flops, hbm, hlo, traffic

WIDTH, ROWS, LAYERS = 64, 16, 4


def layer(x, w):
    return jax.nn.silu(x @ w[0]) @ w[1]


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0] ** 2


def unrolled(x, weights):
    for i in range(weights[0].shape[0]):
        x = layer(x, jax.tree.map(lambda w, i=i: w[i], weights))
    return x**2


def compiled(f, layers=LAYERS):
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    weights = (
        jax.ShapeDtypeStruct((layers, WIDTH, 3 * WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((layers, 3 * WIDTH, WIDTH), jnp.float32),
    )
    loss = jax.value_and_grad(lambda *a: f(*a).sum(), argnums=(0, 1))
    return hlo.parse(jax.jit(loss).lower(x, weights).compile().as_text())


def test_a_scanned_model_counts_as_its_unrolled_one():
    counts = [flops.count(compiled(f), flops.SKEWED) for f in (scanned, unrolled)]
    forward = LAYERS * 2 * 2 * ROWS * WIDTH * 3 * WIDTH
    assert counts[0] == counts[1] == flops.Flops(3 * forward, 0)


def test_recomputation_is_counted_apart():
    plain = flops.count(compiled(scanned), flops.SKEWED)

    def remat(x, weights):
        body = jax.checkpoint(lambda x, w: (layer(x, w), None), prevent_cse=False)
        return jax.lax.scan(body, x, weights)[0] ** 2

    again = flops.count(compiled(remat), flops.SKEWED)
    assert again.again > 0 and again.once == plain.once


LOOP = """HloModule m

%fused (p: s32[], q: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %s = s32[] add(%p, %q)
}}

%body (c: (s32[], s32[])) -> (s32[], s32[]) {{
  %c = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  {next}
  ROOT %t = (s32[], s32[]) tuple(%j, %n)
}}

%condition (d: (s32[], s32[])) -> pred[] {{
  %d = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%d), index=0
  %m = s32[] get-tuple-element(%d), index=1
  ROOT %less = pred[] compare(%k, %m), direction=LT
}}

ENTRY %main (x: s32[]) -> s32[] {{
  %x = s32[] parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %bound = s32[] constant(10)
  %both = (s32[], s32[]) tuple(%copied, {bound})
  %w = (s32[], s32[]) while(%both), condition=%condition, body=%body
  ROOT %o = s32[] get-tuple-element(%w), index=0
}}
"""
ONE = "%j = s32[] add(%i, %one)"
TWICE = "%first = s32[] add(%i, %one)\n  %j = s32[] fusion(%first, %one), kind=kLoop, calls=%fused"


@pytest.mark.parametrize(
    "start,step,bound,trips",
    [
        (0, ONE, "%bound", 10),
        (3, ONE, "%bound", 7),
        (0, TWICE, "%bound", 5),
        (1, TWICE, "%bound", 5),  # 1, 3, 5, 7, 9
        (12, ONE, "%bound", 0),
        (0, ONE, "%x", None),  # data decide
        (0, "%j = s32[] multiply(%i, %n)", "%bound", None),
    ],
)
def test_a_loop_without_a_known_length_runs_as_often_as_its_counter_steps(start, step, bound, trips):
    program = hlo.parse(LOOP.format(start=start, next=step, bound=bound))
    assert program.trips("main", program.computations["main"]["w"]) == trips
    assert program.unknown == ([] if trips is not None else ["w"])


TEXT = """HloModule m

%body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,64]{1,0} get-tuple-element(%p), index=1
  %g = bf16[16,64]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %q = bf16[8,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="kernel"}
  %r = bf16[8,64]{1,0} reduce-scatter(%g), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%i, %r)
}

ENTRY %main (a: bf16[8,64], n: s32[]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %k = (s32[], bf16[8,64]{1,0}) tuple(%n, %a)
  %w = (s32[], bf16[8,64]{1,0}) while(%k), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %o = bf16[8,64]{1,0} get-tuple-element(%w), index=1
}
"""


def test_collectives_of_a_loop():
    gathered, scattered = traffic.collectives(hlo.parse(TEXT), 8)
    part = 8 * 64 * 2
    assert (gathered.kind, gathered.group, gathered.times) == ("all-gather", (0, 4), 5)
    assert (gathered.whole, gathered.received, gathered.bytes) == (2 * part, part, 5 * part)
    assert (scattered.kind, scattered.whole, scattered.received) == ("reduce-scatter", 2 * part, part)


@pytest.mark.parametrize(
    "attributes,want",
    [
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups={{0,2},{1,3}}", [(0, 2), (1, 3)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
        ("replica_groups={}", [tuple(range(8))]),
    ],
)
def test_groups_in_every_notation(attributes, want):
    assert traffic.groups(attributes, 8) == want


def test_a_collective_takes_the_links_that_its_group_spans():
    gathered = traffic.collectives(hlo.parse(TEXT), 8)[0]
    cube = [(i // 4, i // 2 % 2, i % 2) for i in range(8)]
    assert traffic.seconds(gathered, cube, (4.0, 2.0, 1.0)) == gathered.bytes / 4  # 0 and 4 differ along the first axis


def convolution(labels, window, left, right, out):
    def shape(dims):
        return hlo.Shape("bf16", dims)

    attributes = f", window={{{window}}}, dim_labels={labels}"
    i = hlo.Instruction("c", "convolution", [shape(out)], ["a", "b"], attributes, False)
    return flops.instruction_flops(i, [shape(left), shape(right)], flops.SKEWED)


def test_convolutions_that_stand_for_matmuls():
    assert convolution("bf_io->bf", "", (32, 64), (64, 16), (32, 16)) == 2 * 32 * 64 * 16
    # a batch of 6 matmuls [8, 64] x [64, 16]: dilation leaves one pair of places a batch entry
    window = "size=6 pad=5_5 lhs_dilate=6 stride=5"
    assert convolution("0bf_0io->0bf", window, (6, 8, 64), (6, 64, 16), (6, 8, 16)) == 6 * 2 * 8 * 64 * 16


def kernel(name, operands, out, rows):
    i = hlo.Instruction(name, "custom-call", [hlo.Shape("bf16", out)], [], "", False)
    i.attributes = f', custom_call_target="tpu_custom_call", metadata={{op_name="jit({name})/pallas_call"}}'
    return flops.instruction_flops(i, [hlo.Shape("s32", (8,)), *(hlo.Shape("bf16", o) for o in operands)], rows)


def test_grouped_kernels_by_formula():
    gmm = ("gmm", ((2048, 512), (7, 1024, 512)), (2048, 1024))
    tgmm = ("tgmm", ((512, 2048), (2048, 1024)), (7, 512, 1024))
    plain = 2 * 2048 * 512 * 1024
    for each in (gmm, tgmm):
        assert kernel(*each, flops.SKEWED) == plain
        assert kernel(*each, flops.even(7)) == plain * (2048 + 6 * 256) / 2048
        assert kernel(*each, flops.even(7, ways=2)) == plain * (1024 + 3 * 256) / 2048
    wide = (2, 4, 1024, 128)
    attention = {name: 2 * 2 * 4 * 3 * 512**2 * 128 * matmuls for name, matmuls in (("fwd", 2), ("dkv", 5))}
    for name, want in attention.items():
        assert kernel(f"splash_mha_{name}_residuals.1", (wide,) * 3, wide, flops.SKEWED) == want
    with pytest.raises(ValueError, match="without a formula"):
        kernel("other", ((2048, 512), (7, 1024, 512)), (2048, 1024), flops.SKEWED)


def test_hbm_traffic_of_a_loop_reads_each_slice_once():
    """Scanned weights are read layer by layer: traffic grows with the layers, not with their square."""
    few, many = (hbm.traffic(compiled(scanned, layers)) for layers in (4, 16))
    assert few > LAYERS * 2 * 3 * WIDTH * WIDTH * 4
    assert 3 * few < many < 4.4 * few
