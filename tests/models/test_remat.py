"""Remat policies compute no more again than they say; that values and gradients stay is in test_llama.py."""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from readme_jax.config import Model, Remat
from readme_jax.errors import ConfigError
from readme_jax.models.grouped_tpu import grouped_swiglu
from readme_jax.models.layout import to_layout
from readme_jax.models.llama import Llama
from readme_jax.models.remat import DOT
from readme_jax.models.runtime import Runtime
from readme_jax.plan import flops, hlo

ROWS, LENGTH = 2, 16


def test_what_each_policy_computes_again(tiny, random_params):
    """Of a dense scanned model, by FLOPs of the compiled gradient: nothing; attention; all but the last matmul."""
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    params = to_layout(random_params(tiny), "scanned")
    counted = {}
    for policy in get_args(Remat):
        model = Llama(tiny, None, Runtime(layout="scanned", remat=policy))
        loss = jax.grad(lambda p, model=model: (model.apply({"params": p}, tokens)[0] ** 2).sum())
        counted[policy] = flops.count(hlo.parse(jax.jit(loss).lower(params).compile().as_text()), flops.SKEWED)
    a_layer = ROWS * LENGTH * tiny.num_layers
    wide, heads = tiny.num_heads * tiny.head_dim, tiny.num_kv_heads * tiny.head_dim
    attention = 2 * 2 * LENGTH * wide * a_layer  # scores and their product with values
    projections = 2 * tiny.embed_dim * (2 * wide + 2 * heads) * a_layer
    gate_up = 2 * 2 * tiny.embed_dim * tiny.ffn_dim * a_layer
    assert counted["none"].again == 0
    assert 0 < counted["dots"].again <= attention
    assert counted["full"].again == counted["dots"].again + projections + gate_up
    assert len({c.once for c in counted.values()}) == 1


def calls(jaxpr, name):
    """How often a primitive runs in a program without loops."""
    inside = [v for eqn in jaxpr.eqns for v in jax.tree.leaves(dict(eqn.params), is_leaf=lambda v: hasattr(v, "eqns"))]
    deeper = sum(calls(getattr(v, "jaxpr", v), name) for v in inside if hasattr(v, "eqns"))
    return deeper + sum(eqn.primitive.name == name for eqn in jaxpr.eqns)


@pytest.mark.parametrize("names,kernels", [((DOT,), 9), ((), 11)])
def test_grouped_kernels_that_run_for_a_gradient(names, kernels):
    """Three forward, two backward for each of three; gate and up once more unless they are kept."""
    shapes = ((32, 128), (2, 128, 128), (2, 128, 128), (2, 128, 128))
    arguments = [jnp.ones(s, jnp.float32) for s in shapes]
    keep = jax.checkpoint_policies.save_only_these_names(*names)

    @partial(jax.checkpoint, policy=keep)
    def layer(rows, *weights):
        return grouped_swiglu(rows, jnp.array([16, 16], jnp.int32), *weights, interpret=True)

    program = jax.make_jaxpr(jax.grad(lambda *a: layer(*a).sum(), argnums=(0, 1, 2, 3)))(*arguments)
    assert calls(program.jaxpr, "pallas_call") == kernels


def test_a_policy_that_is_none():
    with pytest.raises(ConfigError, match="Model.remat = True: expected"):
        Model(remat=True)
