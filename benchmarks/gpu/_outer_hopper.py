"""A candidate for gradients of grouped weights on Hopper: bulk copies by one warp group, products by two (Pallas,
lowered through Mosaic). Rows are sorted, each expert's from a block's first row on, zeros after its last."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

Array = jax.Array

DEPTH, SIDE, PART = 64, 128, 64  # rows of a step; a warp group's square of the gradient, written in parts of columns
STAGES, GROUPS = 4, 2  # steps in flight; warp groups that multiply


def outer(first: Array, sizes: Array, left: Array, right: Array, block: int, across: int = 8) -> tuple[Array, ...]:
    """left^T right over each expert's rows: [T, A] and [T, C] -> E arrays [A, C]. Expert e has sizes[e] rows, from
    first[e] * block on; A and C are multiples of 128, one of them of 256."""
    shape, experts = (left.shape[1], right.shape[1]), sizes.shape[0]
    wide = shape[1] % (GROUPS * SIDE) == 0  # which side of a tile the two warp groups share
    tile = (SIDE, GROUPS * SIDE) if wide else (GROUPS * SIDE, SIDE)
    assert shape[0] % tile[0] == shape[1] % tile[1] == 0, (shape, tile)
    swizzled = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))
    body = functools.partial(_kernel, block=block, tile=tile, wide=wide, across=across, transforms=swizzled)
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    cores = getattr(device, "num_cores", None) or device.core_count
    kernel = gpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, left.dtype)] * experts,
        grid=(cores,),
        grid_names=("core",),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )
    return tuple(kernel(first, sizes, left, right))


def _kernel(
    first: Any,
    sizes: Any,
    left: Any,
    right: Any,
    *outs: Any,
    block: int,
    tile: tuple[int, int],
    wide: bool,
    across: int,
    transforms: Any,
) -> None:
    tiles = (left.shape[1] // tile[0], right.shape[1] // tile[1])

    def pipeline(steps: Any, begin: Any, at: tuple[Any, Any], multiply: Any, around: Any) -> Any:
        specs = [
            gpu.BlockSpec(
                (DEPTH, tile[n]), functools.partial(lambda n, k: (begin + k, at[n]), n), transforms=transforms
            )
            for n in range(2)
        ]
        return gpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(steps,),
            memory_registers=40,
            in_specs=specs,
            wg_axis="group",
            num_compute_wgs=GROUPS,
            max_concurrent_steps=STAGES,
            compute_context=around,
        )

    def nothing(*_: Any, **__: Any) -> None:
        return None

    zero = jnp.int32(0)
    allocations = pipeline(jnp.int32(STAGES), zero, (zero, zero), nothing, nothing).get_allocations(left, right)

    def scope(allocations: Any, part: Any) -> None:
        group = lax.axis_index("group")
        mine = pl.ds(group * SIDE, SIDE)

        def multiply(_: Any, x: Any, y: Any, sums: Any) -> Any:
            x, y = (x, y.at[:, mine]) if wide else (x.at[:, mine], y)
            gpu.wgmma(sums, x.transpose((1, 0)), y)
            gpu.wgmma_wait(0)
            return sums

        @gpu.nd_loop((len(outs), tiles[0] * tiles[1]), collective_axes="core")
        def _(loop: Any) -> None:
            e = loop.index[0]
            at = gpu.planar_snake(loop.index[1], tiles, 0, across)
            corner = (at[0] * tile[0] + (0 if wide else group * SIDE), at[1] * tile[1] + (group * SIDE if wide else 0))

            def write(value: Array) -> None:
                for n in range(SIDE // PART):
                    gpu.wait_smem_to_gmem(0, wait_read_only=True)
                    part[group] = value[:, n * PART : (n + 1) * PART].astype(part.dtype)
                    gpu.commit_smem()
                    there = (pl.ds(corner[0], SIDE), pl.ds(corner[1] + n * PART, PART))
                    for own, out in enumerate(outs):
                        pl.when(e == own)(functools.partial(gpu.copy_smem_to_gmem, part.at[group], out.at[there]))

            def around(run: Any) -> None:
                def summed(sums: Any) -> None:
                    run(sums)
                    write(sums[...])

                pl.run_scoped(summed, gpu.ACC((SIDE, SIDE), jnp.float32))

            steps, begin = pl.cdiv(sizes[e], DEPTH), first[e] * (block // DEPTH)
            pipeline(steps, begin, at, multiply, around)(left, right, allocations=allocations)

    pl.run_scoped(
        scope,
        allocations=allocations,
        part=gpu.SMEM((GROUPS, SIDE, PART), left.dtype, transforms=transforms),
        collective_axes="group",
    )
    gpu.wait_smem_to_gmem(0, wait_read_only=True)
