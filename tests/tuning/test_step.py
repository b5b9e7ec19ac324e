from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODEL, ROUTER

from readme_jax import config
from readme_jax.models.experts import plan_batch
from readme_jax.models.layout import to_layout
from readme_jax.models.llama import Llama, head_weight
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import batch_sharding
from readme_jax.tuning import step as steps
from readme_jax.tuning.routes import RouterRoutes

pytestmark = pytest.mark.usefixtures("quickly_compiled")
leaves = jax.tree_util.tree_leaves_with_path
TUNING = config.Tuning(rounds=1)
PLAIN = Runtime(segments="masked")  # compiles faster than `blocks`, and computes the same
BATCHED = {"steps": 8, "batch": 4, "lr": 3e-3}


def run(step, params, batch, frozen, times=6, peak=3e-3):
    state, losses = step.start(params), []
    for _ in range(times):
        state, metrics = step.update(state, batch, frozen, peak)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize(
    "permanent,tied,top_k", [(True, False, 1), (False, False, 1), (True, True, 1), (True, False, 2), (False, True, 2)]
)
def test_expert_step_learns(mesh, cut, router, batch, permanent, tied, top_k):
    mixture, params, channels = cut(permanent, tied, top_k)
    runtime = Runtime() if (permanent, top_k) == (True, 2) else PLAIN
    step = steps.build_expert_step(MODEL, mixture, runtime, config.ExpertStage(**BATCHED), TUNING, mesh)
    frozen = {"routes": RouterRoutes(router, ROUTER, top_k), "channels": channels}
    state, losses = run(step, params, batch, frozen)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, params)
    assert all(m > 0 for m in jax.tree.leaves(moved)), "every backbone weight trains"


@pytest.mark.parametrize("objective", ["overlap", "released", "domain", "expert_loss"])
def test_router_step_learns(mesh, dense, cut, router, batch, objective):
    mixture, params, channels = cut()
    stage = config.RouterStage(objective=objective, switch_price=0.1, temperature=1.0, **BATCHED)
    step = steps.build_router_step(MODEL, mixture, ROUTER, PLAIN, stage, TUNING, mesh)
    frozen = {"backbone": params if objective == "expert_loss" else dense, "channels": channels}
    _, losses = run(step, router, batch, {} if objective == "domain" else frozen)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_switching_has_its_price_in_the_routers_loss(mesh, router, batch):
    told = {}
    for price in (0.0, 0.7):
        stage = config.RouterStage(objective="domain", switch_price=price, **BATCHED)
        mixture = config.MixtureConfig(num_experts=3, expert=4)
        step = steps.build_router_step(MODEL, mixture, ROUTER, PLAIN, stage, TUNING, mesh)
        told[price] = step.update(step.start(router), batch, {}, 3e-3)[1]
    rate = float(told[0.7]["switch_rate"])
    assert rate > 0.01
    np.testing.assert_allclose(told[0.7]["loss"], told[0.0]["loss"] + 0.7 * rate, rtol=1e-5)


def test_accumulated_micro_batches_equal_one_batch(mesh, dense, cut, router, batch):
    mixture, params, channels = cut()
    frozen = {"routes": RouterRoutes(router, ROUTER), "channels": channels, "teacher": dense}
    results = {}
    for parts in (1, 2):
        stage = config.ExpertStage(accumulate=parts, distill=0.5, **BATCHED)
        step = steps.build_expert_step(MODEL, mixture, PLAIN, stage, TUNING, mesh)
        state, metrics = step.update(step.start(params), batch, frozen, 3e-3)
        results[parts] = (state.moments[0].mu, metrics)
    for name, value in results[2][1].items():
        np.testing.assert_allclose(value, results[1][1][name], rtol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), results[2][0], results[1][0]
    )


def test_router_micro_batches_equal_one_batch(mesh, dense, cut, router, batch, monkeypatch):
    mixture, _, channels = cut()
    stage = config.RouterStage(temperature=2.0, switch_price=0.3, **BATCHED)
    means = {}
    for tokens in (16384, 24):  # all four rows at once, or two
        monkeypatch.setattr(steps, "MICRO_TOKENS", tokens)
        step = steps.build_router_step(MODEL, mixture, ROUTER, PLAIN, stage, TUNING, mesh)
        state, metrics = step.update(step.start(router), batch, {"backbone": dense, "channels": channels}, 3e-3)
        means[tokens] = (state.moments[0].mu["head"]["w"], metrics["loss"], metrics["switch_rate"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9), means[24], means[16384])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_expert_loss_is_next_token_and_teacher_cross_entropy(mesh, dense, cut, batch, share):
    """Of a dense slice (one expert, no routes) against plain softmaxes."""
    mixture, params, channels = cut(experts=1)
    stage = config.ExpertStage(distill=share, **BATCHED)
    step = steps.build_expert_step(MODEL, mixture, PLAIN, stage, TUNING, mesh)
    frozen = {"channels": channels} | ({"teacher": dense} if share else {})
    _, metrics = step.update(step.start(params), batch, frozen, 0.0)
    tokens = jnp.asarray(batch["tokens"])

    def log_p(tree, shape, plan):
        hidden, _ = Llama(MODEL, shape, PLAIN).apply({"params": tree}, tokens, plan, channels)
        return np.asarray(jax.nn.log_softmax(hidden @ head_weight(tree).T), np.float64)[:, :-1]

    own = log_p(params, mixture, plan_batch(jnp.zeros((*tokens.shape, 1), int), 1))
    soft = np.exp(log_p(dense, None, None))
    text = -np.take_along_axis(own, batch["tokens"][:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(metrics["loss"], (1 - share) * text - share * (soft * own).sum(-1).mean(), rtol=1e-5)


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_dense_model_trains_through_the_same_step(mesh, dense, batch, layout):
    runtime = Runtime(segments="masked", layout=layout, remat="full" if layout == "scanned" else "none")
    step = steps.build_expert_step(MODEL, None, runtime, config.ExpertStage(**BATCHED), TUNING, mesh)
    _, losses = run(step, to_layout(dense, layout), batch, {})
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3


def flat(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(w, np.float64) for p, w in leaves(tree)}


def test_update_is_adamw_on_a_cosine_without_decay_of_norms_and_biases(mesh, router, batch):
    """Three steps against AdamW written out; gradients are read off the first moments."""
    b1, b2, decay, peak, length = 0.8, 0.95, 0.1, 1e-2, 4
    tuning = config.Tuning(weight_decay=decay, beta1=b1, beta2=b2)
    stage = config.RouterStage(objective="domain", steps=length, batch=4)
    mixture = config.MixtureConfig(num_experts=3, expert=4)
    step = steps.build_router_step(MODEL, mixture, ROUTER, PLAIN, stage, tuning, mesh)
    state, w = step.start(router), flat(router)
    m, v = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
    for t in range(3):
        state, metrics = step.update(state, batch, {}, peak)
        lr = peak * 0.5 * (1 + np.cos(np.pi * t / length))
        np.testing.assert_allclose(metrics["lr"], lr, rtol=1e-6)
        for name, after in flat(state.moments[0].mu).items():
            g = (after - b1 * m[name]) / (1 - b1)
            m[name], v[name] = after, b2 * v[name] + (1 - b2) * g * g
            change = m[name] / (1 - b1 ** (t + 1)) / (np.sqrt(v[name] / (1 - b2 ** (t + 1))) + 1e-8)
            spared = name.endswith("norm") or name.endswith(".b")
            w[name] = w[name] - lr * (change + (0 if spared else decay * w[name]))
    assert int(state.step) == 3
    for name, got in flat(state.params).items():
        np.testing.assert_allclose(got, w[name], atol=1e-5, err_msg=name)


def test_norms_and_biases_do_not_decay_in_either_layout(dense, router):
    for tree in (router, dense, to_layout(dense, "scanned")):
        for path, decayed in leaves(steps.decays(tree)):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            assert decayed != (name.endswith("norm") or name.endswith(".b")), name


def test_learning_rate_over_rounds():
    tuning = config.Tuning()
    for round_ in range(8):
        peak = steps.round_peak(5e-5, tuning, round_)
        assert peak == pytest.approx(5e-5 * 0.8**round_)
        rates = np.array([steps.learning_rate(peak, s, 200, 0) for s in range(201)])
        np.testing.assert_allclose(rates, peak * 0.5 * (1 + np.cos(np.pi * np.arange(201) / 200)), atol=1e-9)
    warm = np.array([steps.learning_rate(1.0, s, 10, 4) for s in range(11)])
    np.testing.assert_allclose(warm[:4], [0.25, 0.5, 0.75, 1])
    assert warm[4] == 1 and warm[10] == 0 and (np.diff(warm[4:]) < 0).all()


def test_training_leaves_what_it_started_from_alone(mesh, dense, cut, batch):
    """A mixture shares embeddings with the dense model it was cut from, and steps give their state away."""
    mixture, params, channels = cut(experts=1)
    before = jax.tree.map(np.array, dense)
    step = steps.build_expert_step(MODEL, mixture, PLAIN, config.ExpertStage(**BATCHED), TUNING, mesh)
    state, _ = run(step, params, batch, {"channels": channels}, times=2)
    jax.tree.map(np.testing.assert_array_equal, dense, before)
    assert np.abs(state.params["embed"] - dense["embed"]).max() > 0


def test_steps_compile_from_abstract_arguments(mesh, cut):
    """As for a topology without devices: shapes and shardings alone, and the state comes out as it went in."""
    mixture, _, channels = cut(experts=1)
    step = steps.build_expert_step(MODEL, mixture, PLAIN, config.ExpertStage(**BATCHED), TUNING, mesh)
    tokens = jax.ShapeDtypeStruct((4, 12), jnp.int32, sharding=batch_sharding(mesh))
    frozen = {"channels": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), channels)}
    peak = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = step.update.lower(step.abstract, {"tokens": tokens}, frozen, peak).compile()
    state, metrics = compiled.output_shardings
    assert jax.tree.leaves(state) == jax.tree.leaves(step.shardings)
    assert set(metrics) == {"loss", "grad_norm", "lr"}
