"""Two router kinds to compare with: `layerwise` against a slow version of it, `tokenwise` and its lack of context."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import config
from readme_jax.checkpoints.mixture import Mixture, load_mixture, save_mixture
from readme_jax.config import RouterConfig, RouterStage, Tuning
from readme_jax.errors import CheckpointError, ConfigError
from readme_jax.evaluation.perplexity import Evaluator
from readme_jax.generate import Generator
from readme_jax.models.feed_forward import activations, linear
from readme_jax.models.layerwise import with_gates
from readme_jax.models.layout import to_layout
from readme_jax.models.llama import Llama, attend, embed_tokens, head_weight, prepare, rms_norm
from readme_jax.models.router import Router, config_for, router_cache, start_router
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import make_mesh
from readme_jax.tuning import distill
from readme_jax.tuning.routes import routes_of
from readme_jax.tuning.step import build_router_step

RUNTIME = Runtime(segments="masked")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 260, (2, 12)), jnp.int32)


pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(autouse=True)
def mesh():
    one = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(one):
        yield one


def gates_of(mixture: Mixture, scale: float = 1.0) -> dict[str, jax.Array]:
    shape = (mixture.config.num_layers, mixture.mixture.num_experts, mixture.config.embed_dim)
    return {"gates": jnp.asarray(np.random.default_rng(5).normal(0, scale, shape), jnp.float32)}


def layerwise(mixture: Mixture) -> Mixture:
    """The mixture with gates in place of its router."""
    router = config_for(config.Router(kind="layerwise"), mixture.config, mixture.mixture.num_experts)
    return replace(mixture, router_config=router, router=jax.tree.map(np.asarray, gates_of(mixture)))


def slow_hidden(m: Mixture, tokens: jax.Array) -> jax.Array:
    """Every expert on every token, weighted by the softmax over each token's top K logits in that very layer."""
    ctx, k = prepare(m.config, tokens), m.mixture.top_k
    x = embed_tokens(jnp.asarray(m.params["embed"]), tokens)
    for i in range(m.config.num_layers):
        p = m.params[f"layers_{i}"]
        x, _ = attend(p, m.config, RUNTIME, x, ctx)
        y = rms_norm(x, jnp.asarray(p["ffn_norm"]), m.config.norm_eps)
        logits = np.asarray(jnp.einsum("btd,ed->bte", y, m.router["gates"][i]))
        order = np.argsort(-logits, axis=-1)[..., :k]
        weight = np.zeros_like(logits)
        np.put_along_axis(weight, order, np.asarray(jax.nn.softmax(np.take_along_axis(logits, order, -1))), -1)
        out = 0.0
        for e in range(m.mixture.num_experts):
            part = p[f"experts_{e}"]
            out = out + weight[..., e : e + 1] * linear(activations(part, y), part["down"])
        if "permanent" in p:
            out = out + linear(activations(p["permanent"], y), p["permanent"]["down"])
        x = x + out
    return rms_norm(x, jnp.asarray(m.params["final_norm"]), m.config.norm_eps)


@pytest.mark.parametrize("kind, layout", [("top1", "unrolled"), ("top2", "scanned"), ("own_rows", "unrolled")])
def test_layers_route_for_themselves(tiny_model, kind, layout):
    m = layerwise(tiny_model(kind))
    params, channels = (to_layout(jax.tree.map(jnp.asarray, tree), layout) for tree in (m.params, m.channels))
    model = Llama(m.config, m.mixture, replace(RUNTIME, layout=layout))
    hidden, _ = jax.jit(model.apply)({"params": params}, TOKENS, None, with_gates(channels, m.router["gates"]))
    np.testing.assert_allclose(hidden, slow_hidden(m, TOKENS), atol=2e-4)


def test_gates_learn_each_layers_own_targets(tiny_model, mesh):
    """The gradient of Eq. 4 by gates, against the same loss written layer by layer; and it falls in a few steps."""
    dense, m = tiny_model("dense"), tiny_model("top1")
    stage = RouterStage(steps=30, batch=2, lr=0.05, temperature=2.0)
    router = config_for(config.Router(kind="layerwise"), m.config, m.mixture.num_experts)
    step = build_router_step(m.config, m.mixture, router, RUNTIME, stage, Tuning(), mesh)
    frozen = {"backbone": dense.params, "channels": jax.tree.map(jnp.asarray, m.channels)}
    batch = {"tokens": TOKENS, "domain": jnp.zeros(2, jnp.int32)}
    start = start_router(jax.random.key(0), router, dense.params["embed"])
    state = step.start(start)

    scores = distill.overlap_scores(dense.params, m.config, RUNTIME, frozen["channels"], TOKENS)
    ctx, x, wanted = prepare(m.config, TOKENS), embed_tokens(dense.params["embed"], TOKENS), []
    for i in range(m.config.num_layers):
        p = dense.params[f"layers_{i}"]
        x, _ = attend(p, m.config, RUNTIME, x, ctx)
        y = rms_norm(x, p["ffn_norm"], m.config.norm_eps)
        logits = jnp.einsum("btd,ed->bte", y, start["gates"][i])
        wanted.append(distill.eq4_loss(logits, scores[i : i + 1], 2.0))
        x = x + linear(activations(p["ffn"], y), p["ffn"]["down"])
    losses = []
    for _ in range(30):
        state, metrics = step.update(state, batch, frozen, np.float32(0.05))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(float(np.mean(wanted)), rel=1e-5)
    assert losses[-1] < 0.7 * losses[0]


def test_a_layerwise_mixture_is_kept_evaluated_and_generates_but_is_not_served(tiny_model, tmp_path, mesh):
    m = layerwise(tiny_model("top1"))
    save_mixture(tmp_path / "m", m)
    back = load_mixture(tmp_path / "m")
    assert back.router_config == m.router_config
    np.testing.assert_array_equal(back.router["gates"], m.router["gates"])

    routes = routes_of(jax.tree.map(jnp.asarray, back.router), back.router_config, 1)
    evaluator = Evaluator(m.config, m.mixture, RUNTIME, mesh, batch=2)
    losses = evaluator.losses(m.params, np.asarray(TOKENS), routes, m.channels)
    logits = linear(slow_hidden(m, TOKENS), jnp.asarray(head_weight(m.params)))
    slow = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses.nats, slow, atol=2e-3)
    assert losses.experts is None

    prompt = [int(t) for t in TOKENS[0]]
    generated = Generator(back, RUNTIME).generate([prompt], 4)
    tokens = list(prompt)
    for token in generated.tokens[0]:
        last = linear(slow_hidden(m, jnp.asarray([tokens]))[:, -1], jnp.asarray(head_weight(m.params)))[0]
        assert last[token] > last.max() - 1e-2
        tokens.append(token)
    not_served(back)


def not_served(mixture: Mixture) -> None:
    from readme_jax.config import Serving
    from readme_jax.serving.engine import Engine

    assert mixture.router_config is not None
    with pytest.raises(CheckpointError, match=f"a {mixture.router_config.kind} router is not served"):
        Engine.build(mixture, Serving(rows=2, length=64, chunk=16, budget=16, scheduler="decode_first"))


def test_tokenwise_router_sees_a_token_and_no_context(tiny_model):
    cfg = RouterConfig(vocab_size=260, num_experts=3, dim=16, num_heads=2, head_dim=8, mlp_dim=16, kind="tokenwise")
    m = tiny_model("top1")
    params = {"params": jax.tree.map(jnp.asarray, m.router)}
    whole, _ = Router(cfg).apply(params, TOKENS)
    standing = jax.jit(lambda p, t: Router(replace(cfg, kind="pregating")).apply(p, t)[0])
    alone = [standing(params, TOKENS[:, t : t + 1]) for t in range(12)]
    np.testing.assert_allclose(whole, jnp.concatenate(alone, axis=1), atol=1e-5)  # as if each token stood alone
    seeing, _ = Router(replace(cfg, kind="pregating")).apply(params, TOKENS)
    assert float(jnp.abs(whole - seeing)[:, 1:].max()) > 1e-2

    cache, steps, step = router_cache(cfg, 2, 16), [], jax.jit(Router(cfg).apply)
    for t in range(12):
        logits, cache = step(params, TOKENS[:, t : t + 1], None, cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=1e-5)
    not_served(replace(m, router_config=replace(m.router_config, kind="tokenwise")))


def test_layerwise_has_no_experts_own_losses():
    with pytest.raises(ConfigError, match="expert_loss.*layerwise"):
        config.Run(router=config.Router(kind="layerwise"), router_stage=RouterStage(objective="expert_loss"))
