"""Calibrate, select, slice and refit against slow NumPy versions and against what a user relies on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax import config
from readme_jax.checkpoints.hf import Dense, open_dense, save_dense
from readme_jax.errors import ConfigError
from readme_jax.loading import LayerByLayer
from readme_jax.models.experts import plan_batch
from readme_jax.models.llama import Llama
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import make_mesh
from readme_jax.refactor import refit, select
from readme_jax.refactor.calibrate import channel_statistics
from readme_jax.refactor.convert import convert
from readme_jax.refactor.slice import lay_out

MODEL = config.ModelConfig(
    vocab_size=97, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=40, tie_embeddings=True
)
RUNTIME = Runtime()


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(config.Mesh())):
        yield


@pytest.fixture(scope="module")
def params():
    import flax.linen as nn

    with jax.set_mesh(make_mesh(config.Mesh())):
        tree = nn.unbox(Llama(MODEL).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    return jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, tree)  # far from linear, so that selection matters


@pytest.fixture(scope="module")
def calibration():
    rng = np.random.default_rng(0)
    return {d: rng.integers(i * 30, i * 30 + 30, (6, 32)).astype(np.int32) for i, d in enumerate(("a", "b", "c"))}


def numpy_layers(params, tokens):
    """Slow float64 forward: the FFN's input activations and output of every layer, and the stream before each."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + MODEL.norm_eps) * scale

    def rope(x):
        half = MODEL.head_dim // 2
        freqs = MODEL.rope_theta ** -(np.arange(half) / half)
        angles = np.arange(x.shape[1])[:, None] * freqs
        cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x, seen = p["embed"][tokens], []
    n, length = tokens.shape
    for i in range(MODEL.num_layers):
        q = p[f"layers_{i}"]
        y = norm(x, q["attn_norm"])
        heads = [(y @ q[w].T).reshape(n, length, -1, MODEL.head_dim) for w in "qkv"]
        qs, ks, vs = rope(heads[0]), rope(heads[1]), heads[2]
        out = np.zeros_like(qs)
        for h in range(MODEL.num_heads):
            kv = h * MODEL.num_kv_heads // MODEL.num_heads
            scores = np.einsum("bth,bsh->bts", qs[:, :, h], ks[:, :, kv]) / np.sqrt(MODEL.head_dim)
            scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, :, h] = np.einsum("bts,bsh->bth", weights / weights.sum(-1, keepdims=True), vs[:, :, kv])
        u = x + out.reshape(n, length, -1) @ q["o"].T
        y = norm(u, q["ffn_norm"])
        gate = y @ q["ffn"]["gate"].T
        a = gate / (1 + np.exp(-gate)) * (y @ q["ffn"]["up"].T)
        seen.append({"before": u, "a": a, "out": a @ q["ffn"]["down"].T})
        x = u + seen[-1]["out"]
    return seen


def test_channel_statistics_equal_numpy(params, calibration):
    found = channel_statistics(params, MODEL, RUNTIME, calibration["a"], batch=4)
    for layer, seen in enumerate(numpy_layers(params, calibration["a"])):
        np.testing.assert_allclose(found.mean_abs[layer], np.abs(seen["a"]).mean((0, 1)), rtol=2e-4)
        np.testing.assert_allclose(found.rms[layer], np.sqrt((seen["a"] ** 2).mean((0, 1))), rtol=2e-4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_top_channels_keeps_exactly_the_width_under_ties(scores, data):
    width = data.draw(st.integers(1, len(scores)))
    mask = select.top_channels(np.array(scores), width)
    assert mask.sum() == width
    if width < len(scores):
        assert np.array(scores)[mask].min() >= np.array(scores)[~mask].max()


def test_rmsw_is_the_root_mean_square_of_what_a_channel_writes():
    rng = np.random.default_rng(7)
    a, down = rng.normal(size=(50, 6)), rng.normal(size=(4, 6))
    written = [np.sqrt(np.mean([sum((down[:, c] * token[c]) ** 2) for token in a])) for c in range(6)]
    np.testing.assert_allclose(select.rmsw(np.sqrt((a**2).mean(0)), down), written, rtol=1e-6)


def random_moments(seed, n=300, f=40, d=16):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, f)) @ (np.eye(f) + 0.5 * rng.normal(size=(f, f)))
    t = a @ rng.normal(size=(f, d)) + rng.normal(size=(n, d))
    moments = select.Moments(*(jnp.asarray(x, jnp.float32) for x in (np.abs(a).sum(0), a.T @ a, t.T @ a)))
    return a, t, moments


def ridge_cost(a, t, mask, ridge):
    """Least ridge cost of writing t from the channels of a mask, in float64."""
    gram = a.T @ a
    penalty = ridge * gram.diagonal().mean()
    kept = a[:, mask]
    w = np.linalg.solve(kept.T @ kept + penalty * np.eye(mask.sum()), kept.T @ t)
    return ((kept @ w - t) ** 2).sum() + penalty * (w**2).sum(), w.T


@pytest.mark.parametrize("seed", range(3))
def test_refit_is_the_ridge_solution(seed):
    a, t, moments = random_moments(seed)
    mask = np.random.default_rng(seed).random(40) < 0.5
    down = np.asarray(refit.refit_down(moments, refit.padded_rows(mask, 33), 1e-2))
    np.testing.assert_allclose(down[:, mask], ridge_cost(a, t, mask, 1e-2)[1], rtol=2e-3, atol=2e-3)
    assert (down[:, ~mask] == 0).all()


def test_joint_refit_is_the_minimum_over_shared_and_own_parts():
    sets = [random_moments(s) for s in range(3)]
    rng = np.random.default_rng(9)
    shared = np.arange(40) < 8
    masks = np.stack([shared | ((rng.random(40) < 0.4) & ~shared) for _ in sets])
    prior = rng.normal(size=(16, 40))
    common, owns = refit.refit_jointly([m for *_, m in sets], masks, shared, jnp.asarray(prior, jnp.float32), 1e-2)
    # The same problem as one dense ridge regression in float64: block columns for the shared and each own part. The
    # ridge draws to the prior: solve for the change from it.
    rows, targets, penalties = [], [], []
    widths = [int((m & ~shared).sum()) for m in masks]
    for e, (a, t, _) in enumerate(sets):
        block = np.zeros((len(a), 8 + sum(widths)))
        block[:, :8] = a[:, shared]
        block[:, 8 + sum(widths[:e]) : 8 + sum(widths[: e + 1])] = a[:, masks[e] & ~shared]
        rows.append(block)
        targets.append(t - a[:, masks[e]] @ prior.T[masks[e]])
        penalties.append(1e-2 * (a * a).sum(0).mean())
    x, y = np.concatenate(rows), np.concatenate(targets)
    diagonal = np.concatenate(
        [np.full(8, sum(penalties)), *(np.full(w, p) for w, p in zip(widths, penalties, strict=True))]
    )
    w = np.linalg.solve(x.T @ x + np.diag(diagonal), x.T @ y).T
    np.testing.assert_allclose(np.asarray(common)[:, shared], w[:, :8] + prior[:, shared], rtol=5e-3, atol=5e-3)
    for e in range(3):
        first = 8 + sum(widths[:e])
        mine = masks[e] & ~shared
        wanted = w[:, first : first + widths[e]] + prior[:, mine]
        np.testing.assert_allclose(np.asarray(owns[e])[:, mine], wanted, rtol=5e-3, atol=5e-3)


def test_shared_moments_are_those_of_a_text_with_a_little_of_the_others():
    """Adding `share` times the others' mean moments equals weighting their tokens so in one sum."""
    rng = np.random.default_rng(3)
    texts = [rng.standard_normal((50, 6)) for _ in range(3)]
    wanted = [rng.standard_normal((50, 4)) for _ in range(3)]

    def moments(weights):
        pairs = list(zip(weights, texts, wanted, strict=True))
        return select.Moments(
            jnp.asarray(sum(w * np.abs(a).sum(0) for w, a, _ in pairs)),
            jnp.asarray(sum(w * a.T @ a for w, a, _ in pairs)),
            jnp.asarray(sum(w * t.T @ a for w, a, t in pairs)),
        )

    each = [moments(np.eye(3)[i]) for i in range(3)]
    for i, found in enumerate(select.shared_moments(each, 0.5)):
        expected = moments(np.where(np.arange(3) == i, 1.0, 0.25))
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert select.shared_moments(each[:1], 0.5) == each[:1]  # a dense slice has no others


@pytest.mark.parametrize("seed", range(3))
def test_obs_finds_cheaper_channels_than_magnitude(seed):
    """What obs keeps costs less after refit than what mean |a| keeps, and no more than one-shot obs."""
    a, t, moments = random_moments(seed, n=400, f=120, d=16)
    width = 40
    greedy = select.top_channels(np.asarray(select.obs(moments, 1e-2, width)), width)
    magnitude = select.top_channels(np.abs(a).mean(0), width)
    gram = a.T @ a
    inverse = np.linalg.inv(gram + 1e-2 * gram.diagonal().mean() * np.eye(120))
    once = select.top_channels(((t.T @ a @ inverse) ** 2).sum(0) / inverse.diagonal(), width)
    costs = [ridge_cost(a, t, m, 1e-2)[0] for m in (greedy, once, magnitude)]
    assert costs[0] < costs[2]
    assert costs[0] <= costs[1] * 1.01


def test_obs_removes_one_channel_at_the_least_cost():
    a, t, moments = random_moments(5)
    full = np.ones(40, bool)
    costs = [ridge_cost(a, t, full & (np.arange(40) != c), 1e-2)[0] for c in range(40)]
    kept = select.top_channels(np.asarray(select.obs(moments, 1e-2, 39)), 39)
    assert np.flatnonzero(~kept) == [int(np.argmin(costs))]


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 4, 128]))
@settings(max_examples=30)
def test_lay_out_covers_exactly_the_masks(seed, permanent, align):
    rng = np.random.default_rng(seed)
    masks = np.stack([[select.top_channels(rng.random(24), 10) for _ in range(3)] for _ in range(2)])
    masks[:, :, 3] = True  # at least one channel in common
    mixture, channels = lay_out(masks, permanent, False, 1, align)
    assert mixture.expert % align == 0 and mixture.permanent % align == 0
    for layer in range(2):
        shared = channels[f"layers_{layer}"]["permanent"]
        in_all = np.flatnonzero(masks[layer].all(0)) if permanent else []
        assert shared[shared < 24].tolist() == list(in_all)
        for e in range(3):
            own = channels[f"layers_{layer}"]["experts"][e]
            kept = np.concatenate([shared[shared < 24], own[own < 24]])
            assert sorted(kept) == np.flatnonzero(masks[layer, e]).tolist()
            assert (np.diff(own[own < 24]) > 0).all()


@partial(jax.jit, static_argnames=("mixture", "backend"))
def hidden(params, channels, tokens, expert, mixture=None, backend="masked"):
    """Final hidden states, of a mixture with every token on one expert. (Back ends are compared in tests/models.)"""
    if mixture is None:
        return Llama(MODEL).apply({"params": params}, tokens)[0]
    plan = plan_batch(jnp.full((*tokens.shape, 1), expert, jnp.int32), mixture.num_experts)
    return Llama(MODEL, mixture, Runtime(segments=backend)).apply({"params": params}, tokens, plan, channels)[0]


def mixture_hidden(sliced, tokens, expert):
    return hidden(sliced.params, sliced.channels, tokens, expert, sliced.mixture)


@pytest.mark.parametrize(
    ("permanent", "tied", "score"),
    [(True, False, "mean_abs"), (False, False, "obs"), (True, True, "rmsw"), (False, True, "mean_abs")],
)
def test_sliced_equals_dense_with_masked_channels(params, calibration, permanent, tied, score):
    sliced = convert(
        params, MODEL, calibration, config.Slice(score=score, permanent=permanent, tied=tied, align=8), RUNTIME
    )
    tokens = jnp.asarray(calibration["b"][:2])
    for expert in range(3):
        masked = {k: dict(v) if k.startswith("layers_") else v for k, v in params.items()}
        for i in range(MODEL.num_layers):
            found = sliced.channels[f"layers_{i}"]
            kept = np.concatenate([found["permanent"], found["experts"][expert]])
            mask = np.isin(np.arange(MODEL.ffn_dim), kept)
            assert mask.sum() == 20
            ffn = params[f"layers_{i}"]["ffn"]
            masked[f"layers_{i}"]["ffn"] = ffn | {"down": ffn["down"] * mask}
        wanted = hidden(masked, None, tokens, 0)
        np.testing.assert_allclose(mixture_hidden(sliced, tokens, expert), wanted, atol=1e-5)


@pytest.mark.parametrize("refit_kind", ["none", "one_shot", "sequential"])
def test_full_width_equals_the_dense_model(params, calibration, refit_kind):
    sliced = convert(
        params, MODEL, calibration, config.Slice(width=1.0, permanent=False, refit=refit_kind, ridge=1e-7), RUNTIME
    )
    tokens = jnp.asarray(calibration["a"][:2])
    wanted = hidden(params, None, tokens, 0)
    np.testing.assert_allclose(mixture_hidden(sliced, tokens, 0), wanted, atol=1e-5 if refit_kind == "none" else 2e-2)


@pytest.mark.parametrize("permanent", [True, False])
def test_refit_lowers_the_error_of_the_final_stream(params, calibration, permanent):
    """Sequential refit beats no refit on the text it was fitted to, layer by layer and with a shared part."""
    tokens = jnp.asarray(calibration["a"])
    wanted = hidden(params, None, tokens, 0)
    errors = {}
    for kind in ("none", "one_shot", "sequential"):
        sliced = convert(
            params, MODEL, calibration, config.Slice(score="rmsw", permanent=permanent, refit=kind), RUNTIME
        )
        errors[kind] = float(jnp.mean((mixture_hidden(sliced, tokens, 0) - wanted) ** 2))
    assert errors["sequential"] < errors["none"]
    assert errors["sequential"] < errors["one_shot"]


def test_sequential_observation_targets_the_drift(params, calibration):
    tokens = calibration["a"][:4]
    seen = numpy_layers(params, tokens)
    p = params["layers_0"]
    start = jnp.asarray(params["embed"])[tokens]
    drifted = start + 0.1
    moments, after, stream = refit.observe(
        refit.no_moments(MODEL), p, start.copy(), drifted, MODEL, RUNTIME, sequential=True
    )
    np.testing.assert_allclose(after, seen[0]["before"] + seen[0]["out"], atol=1e-4)
    y = np.asarray(stream, np.float64)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + MODEL.norm_eps) * np.asarray(p["ffn_norm"])
    gate = y @ np.asarray(p["ffn"]["gate"], np.float64).T
    a = (gate / (1 + np.exp(-gate)) * (y @ np.asarray(p["ffn"]["up"], np.float64).T)).reshape(-1, MODEL.ffn_dim)
    target = (np.asarray(after) - np.asarray(stream)).reshape(-1, MODEL.embed_dim)
    np.testing.assert_allclose(moments.gram, a.T @ a, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(moments.cross, target.T @ a, rtol=1e-3, atol=1e-3)


def test_dense_slice_is_one_expert_without_permanent_part(params, calibration):
    sliced = convert(params, MODEL, calibration, config.Slice(experts="one"), RUNTIME)
    assert (sliced.mixture.num_experts, sliced.mixture.expert, sliced.mixture.permanent) == (1, 20, 0)


@pytest.mark.parametrize("refit_kind", ["none", "one_shot"])
def test_layers_may_leave_the_devices_as_they_are_cut(params, calibration, refit_kind):
    """`keep` gets one layer at a time, and a layer that it copied does not stay."""
    cut, held = config.Slice(score="rmsw", refit=refit_kind), []

    def keep(layer):
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return jax.tree.map(np.array, layer)

    whole = convert(params, MODEL, calibration, cut, RUNTIME)
    want = jax.tree.map(np.array, whole.params)
    del whole
    sliced = convert(params, MODEL, calibration, cut, RUNTIME, keep=keep)
    layers = {k: v for k, v in sliced.params.items() if k.startswith("layers_")}
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(layers))
    jax.tree.map(np.testing.assert_array_equal, sliced.params, want)
    assert len(held) == MODEL.num_layers > 1 and max(held) == held[0]


@pytest.mark.parametrize(("score", "refit_kind"), [("mean_abs", "none"), ("rmsw", "one_shot"), ("obs", "sequential")])
def test_a_model_read_layer_by_layer_is_cut_alike(params, calibration, tmp_path, score, refit_kind):
    """On the devices is no other layer than that which is looked at."""
    save_dense(tmp_path / "dense", Dense(MODEL, jax.tree.map(np.array, params), None))
    cut = config.Slice(score=score, refit=refit_kind, permanent=False)
    want = jax.tree.map(np.array, convert(params, MODEL, calibration, cut, RUNTIME).params)
    gate, held = params["layers_0"]["ffn"]["gate"].shape, []
    before = {id(x) for x in jax.live_arrays()}

    def count(_):
        held.append(sum(x.shape == gate and id(x) not in before for x in jax.live_arrays()))

    layers = LayerByLayer(open_dense(tmp_path / "dense"), jax.sharding.get_mesh())
    sliced = convert(layers, MODEL, calibration, cut, RUNTIME, count, partial(jax.tree.map, np.array))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, sliced.params), want)
    assert max(held) == 2 < 2 * MODEL.num_layers, "gate and up of one layer"


def test_tied_experts_cannot_be_refitted():
    with pytest.raises(ConfigError, match="refit"):
        config.Slice(tied=True, refit="sequential")
