"""Every GPU kernel is taken down to Triton's language here, at the shapes of real models: what Triton refuses to take
(tiles that are no powers of two, operations that it lacks) is found without a GPU."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import pytest

from readme_jax.models.grouped_gpu import grouped_swiglu, tiles_for
from readme_jax.models.segments import Expert, plan_routes
from readme_jax.serving.kernels import Tiles, attend_and_write
from readme_jax.serving.matvec import Normed, gated, matvec
from readme_jax.serving.prompt_kernel import attend_chunk
from readme_jax.serving.state import Cache

BF16 = jnp.bfloat16


def lowered(function, *arguments) -> str:
    """The program of a function of shapes for an H100, as StableHLO."""
    device = contextlib.nullcontext()
    if hasattr(jax.sharding, "AbstractDevice"):  # later versions ask for the device's kind
        kind = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
        device = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=kind))
    with device:
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def array(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def cache(rows, heads, width, length):
    return Cache((array(rows, heads, width, length),), (array(rows, heads, length, width),))


INDEX = array(dtype=jnp.int32)


@pytest.mark.parametrize("heads, kv_heads, width, window", [(32, 32, 128, None), (32, 8, 128, 4096), (9, 3, 64, None)])
def test_attention_of_a_chunk(heads, kv_heads, width, window):
    def attend(q, cache, row, start):
        return attend_chunk(q, cache, row, start, window)

    assert "prompt_attention" in lowered(
        attend, array(512, heads, width), cache(4, kv_heads, width, 8192), INDEX, INDEX
    )


@pytest.mark.parametrize(
    "heads, kv_heads, width, tiles",
    [(32, 32, 128, Tiles()), (32, 8, 128, Tiles()), (9, 3, 64, Tiles()), (32, 32, 128, Tiles(block=128, rows=16))],
)
def test_attention_of_a_decode_step(heads, kv_heads, width, tiles):
    def attend(qkv, cos, sin, cache, positions, runs):
        return attend_and_write(qkv, cos, sin, cache, positions, runs, tiles=tiles)

    angles = array(width // 2, 8, dtype=jnp.float32)
    arguments = (array((heads + 2 * kv_heads) * width, 8), angles, angles, cache(8, kv_heads, width, 1024))
    assert f"decode_attention_{heads}x{width}" in lowered(
        attend, *arguments, array(8, dtype=jnp.int32), array(8, dtype=bool)
    )


@pytest.mark.parametrize("width, own", [(4096, 5504), (576, 768)])
def test_products_of_few_columns(width, own):
    def feed_forward(x, scale, gate, up, down):
        return matvec(down, gated(gate, up, Normed(x, scale, 1e-5)), x)

    step = lowered(feed_forward, array(width, 2), array(width), array(own, width), array(own, width), array(width, own))
    assert f'"matvec_{width}x{own}"' in step and f'"gated_matvec_{own}x{width}"' in step


@pytest.mark.parametrize(
    "tokens, width, own, dtype",
    [
        (8192, 4096, 5504, BF16),
        (512, 4096, 5504, BF16),
        (32, 4096, 5504, BF16),
        (8, 576, 768, BF16),
        (16384, 576, 768, BF16),
        (16384, 576, 768, jnp.float32),
    ],
)
def test_grouped_feed_forward_and_its_gradients(tokens, width, own, dtype):
    shapes = [(own, width), (own, width), (width, own)]
    experts = [Expert(*(array(*shape, dtype=dtype) for shape in shapes))] * 7

    def loss(x, experts, routes):
        plan = plan_routes(routes, 7)
        y = grouped_swiglu(x, plan.slots, plan.inverse, plan.sizes, experts, tiles_for(tokens, dtype))
        return y.astype(jnp.float32).sum()

    step = lowered(
        jax.grad(loss, argnums=(0, 1)), array(tokens, width, dtype=dtype), experts, array(tokens, 1, dtype=jnp.int32)
    )
    assert "grouped_outer" in step
