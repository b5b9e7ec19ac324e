"""Experts that learn from each other's text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODEL, ROUTER

from readme_jax import config
from readme_jax.models.layout import to_layout
from readme_jax.models.runtime import Runtime
from readme_jax.tuning import step as steps
from readme_jax.tuning.routes import RouterRoutes
from readme_jax.tuning.sharing import share_gradients

pytestmark = pytest.mark.usefixtures("quickly_compiled")
F = MODEL.ffn_dim


def gradients_like(params):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)


def slowly(layer, rows, name, weight):
    """The module's equation, channel by channel."""
    along = (lambda g, c: g[:, c]) if name == "down" else (lambda g, c: g[c])
    mine = {e: np.asarray(layer[f"experts_{e}"][name]) for e in range(len(rows))}
    mixed = {e: g.copy() for e, g in mine.items()}
    for e, own in enumerate(rows):
        for at, channel in enumerate(own):
            if channel == F:
                continue
            for j, others in enumerate(rows):
                if j != e and channel in others:
                    along(mixed[e], at)[...] += weight * along(mine[j], list(others).index(channel))
    return mixed


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_experts_get_the_others_gradients_on_channels_that_both_hold(cut, weight):
    _, params, channels = cut(False)
    gradients = gradients_like(params)
    mixed = share_gradients(gradients, channels, F, weight)
    for layer in channels:
        rows = np.asarray(channels[layer]["experts"])
        for name in ("gate", "up", "down"):
            for e, expected in slowly(gradients[layer], rows, name, weight).items():
                real = rows[e] < F
                got = np.asarray(mixed[layer][f"experts_{e}"][name])
                pick = (slice(None), real) if name == "down" else real
                np.testing.assert_allclose(got[pick], expected[pick], atol=1e-5)
    others = [key for key in gradients if key not in channels]
    assert all((np.asarray(mixed[key]) == np.asarray(gradients[key])).all() for key in others)
    assert (np.asarray(mixed["layers_0"]["q"]) == np.asarray(gradients["layers_0"]["q"])).all()


def test_layouts_agree(cut):
    _, params, channels = cut(True)
    gradients = gradients_like(params)
    unrolled = share_gradients(gradients, channels, F, 0.5)
    scanned = share_gradients(to_layout(gradients, "scanned"), to_layout(channels, "scanned"), F, 0.5)
    for a, b in zip(jax.tree.leaves(to_layout(unrolled, "scanned")), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_fully_shared_they_are_the_gradients_of_tied_experts(mesh, cut, router, batch):
    """Adam's first moments after a step, of copies and of the dense layer that tied experts index."""
    moments = {}
    for tied in (False, True):
        mixture, params, channels = cut(False, tied)
        stage = config.ExpertStage(steps=4, batch=4, share=0.0 if tied else 1.0)
        step = steps.build_expert_step(MODEL, mixture, Runtime(segments="masked"), stage, config.Tuning(), mesh)
        frozen = {"routes": RouterRoutes(router, ROUTER), "channels": channels}
        state, _ = step.update(step.start(params), batch, frozen, 1e-3)
        moments[tied] = state.moments[0].mu
    for layer, held in channels.items():
        ffn = moments[True][layer]["ffn"]
        for e, rows in enumerate(np.asarray(held["experts"])):
            real = rows < F
            own = moments[False][layer][f"experts_{e}"]
            for name in ("gate", "up"):
                np.testing.assert_allclose(own[name][real], ffn[name][rows[real]], atol=1e-6)
            np.testing.assert_allclose(own["down"][:, real], ffn["down"][:, rows[real]], atol=1e-6)
