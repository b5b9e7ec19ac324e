"""Losses by domain, the matrix of experts and domains, and how experts are used, against slow versions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from readme_jax import config
from readme_jax.errors import DataError
from readme_jax.evaluation.matrix import expert_matrix
from readme_jax.evaluation.perplexity import Evaluator, Losses, geometric_mean, perplexities
from readme_jax.evaluation.usage import expert_shares, repeat_rate, usage
from readme_jax.models.experts import plan_batch
from readme_jax.models.llama import Llama, head_weight
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import make_mesh
from readme_jax.tuning.routes import DomainRoutes, RouterRoutes

pytestmark = pytest.mark.usefixtures("quickly_compiled")
WINDOWS = np.random.default_rng(0).integers(0, 256, (5, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(config.Mesh(), jax.devices()[:1])


def slow_nats(model, windows: np.ndarray, experts: np.ndarray | None, mesh) -> np.ndarray:
    """Cross-entropy of each token after the first, in NumPy from whole logits."""
    mixture = getattr(model, "mixture", None)
    with jax.set_mesh(mesh):
        plan = None if experts is None else plan_batch(jnp.asarray(experts), mixture.num_experts)
        apply = jax.jit(Llama(model.config, mixture, Runtime(segments="masked")).apply)
        hidden, _ = apply({"params": model.params}, jnp.asarray(windows), plan, getattr(model, "channels", None))
        logits = np.asarray(hidden @ head_weight(model.params).T, np.float64)[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(logs, windows[:, 1:, None], axis=-1)[..., 0]


def test_dense_losses_of_an_odd_number_of_windows(tiny_model, mesh):
    model = tiny_model("dense")
    losses = Evaluator(model.config, None, Runtime(), mesh, batch=2).losses(model.params, WINDOWS)
    expected = slow_nats(model, WINDOWS, None, mesh)
    np.testing.assert_allclose(losses.nats, expected, atol=2e-4)
    assert losses.experts is None
    assert losses.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-4)


def test_mixture_losses_follow_its_routes(tiny_model, mesh):
    model = tiny_model("top1")
    evaluator = Evaluator(model.config, model.mixture, Runtime(), mesh, batch=2)
    routes = RouterRoutes(model.router, model.router_config)
    losses = evaluator.losses(model.params, WINDOWS, routes)
    assert losses.experts.shape == (*WINDOWS.shape, 1)
    assert len(np.unique(losses.experts)) > 1
    np.testing.assert_allclose(losses.nats, slow_nats(model, WINDOWS, losses.experts, mesh), atol=2e-4)


def test_domains_are_told_to_routes_in_order(tiny_model, mesh):
    model = tiny_model("top1")
    evaluator = Evaluator(model.config, model.mixture, Runtime(), mesh)
    losses = evaluator.domains(model.params, {"b": WINDOWS[:2], "a": WINDOWS[2:]}, DomainRoutes(3))
    assert np.all(losses["b"].experts == 0) and np.all(losses["a"].experts == 1)


def test_matrix_forces_each_expert_and_the_oracle_takes_the_best_a_window(tiny_model, mesh):
    model = tiny_model("tied")
    evaluator = Evaluator(model.config, model.mixture, Runtime(), mesh)
    validation = {"a": WINDOWS[:2], "b": WINDOWS[2:]}
    matrix = expert_matrix(evaluator, model.params, validation, model.channels)
    each = [slow_nats(model, WINDOWS, np.full((*WINDOWS.shape, 1), e), mesh).mean(1) for e in range(3)]
    for j, part in enumerate((slice(0, 2), slice(2, 5))):
        expected = [math.exp(nats[part].mean()) for nats in each]
        np.testing.assert_allclose(matrix.perplexity[:, j], expected, rtol=1e-4)
    best = np.min(each, axis=0)
    best = {"a": math.exp(best[:2].mean()), "b": math.exp(best[2:].mean())}
    assert matrix.oracle == pytest.approx(best, rel=1e-4)


def test_two_experts_a_token_forced_to_one_equal_that_one(tiny_model, mesh):
    two, windows = tiny_model("top2"), WINDOWS[:2]
    one = tiny_model("top1")
    forced = expert_matrix(Evaluator(two.config, two.mixture, Runtime(), mesh), two.params, {"a": windows})
    alone = expert_matrix(Evaluator(one.config, one.mixture, Runtime(), mesh), one.params, {"a": windows})
    np.testing.assert_allclose(forced.perplexity, alone.perplexity, rtol=1e-5)


def test_bad_windows_and_missing_routes_are_named(tiny_model, mesh):
    dense, mixture = tiny_model("dense"), tiny_model("top1")
    with pytest.raises(DataError, match="windows of shape"):
        Evaluator(dense.config, None, Runtime(), mesh).losses(dense.params, WINDOWS[:0])
    with pytest.raises(ValueError, match="routes"):
        Evaluator(mixture.config, mixture.mixture, Runtime(), mesh).losses(mixture.params, WINDOWS)


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=8), st.floats(0.1, 10))
def test_geometric_mean_scales_with_its_values(values, factor):
    mean = geometric_mean(values)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    assert geometric_mean(v * factor for v in values) == pytest.approx(mean * factor)


def test_usage_counts_choices_and_repeats_look_at_the_first():
    experts = np.asarray([[[0, 1], [0, 2], [1, 0], [1, 2]], [[2, 0], [2, 1], [2, 0], [0, 1]]])
    np.testing.assert_allclose(expert_shares(experts, 4), [6 / 16, 5 / 16, 5 / 16, 0])
    assert repeat_rate(experts) == pytest.approx(4 / 6)
    losses = {"a": Losses(np.zeros((2, 3)), experts), "b": Losses(np.ones((1, 3)), None)}
    assert list(usage(losses, 4)) == ["a"]
    assert perplexities(losses) == pytest.approx({"a": 1.0, "b": math.e})
