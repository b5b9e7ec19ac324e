"""The blockwise loss against a plain log-softmax, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax.models import cross_entropy
from readme_jax.models.cross_entropy import lm_loss, token_losses

BATCH, LENGTH, WIDTH, VOCAB = 3, 11, 8, 29


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "ROWS", 12)  # 4 positions a block: 11 is no multiple


@pytest.fixture
def case():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights = jnp.asarray(rng.choice([0.0, 1.0, 2.5], (BATCH, LENGTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    teacher = (normal(BATCH, LENGTH, 6), normal(VOCAB, 6))
    return normal(BATCH, LENGTH, WIDTH), normal(VOCAB, WIDTH), targets, weights, teacher


def naive(hidden, head, targets, weights, teacher, distill):
    logs = jax.nn.log_softmax(hidden @ head.T, axis=-1)
    hard = -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    soft = 0.0
    if distill:
        soft = -(jax.nn.softmax(teacher[0] @ teacher[1].T, axis=-1) * logs).sum(-1)
    return (weights * ((1 - distill) * hard + distill * soft)).sum() / weights.sum()


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_value_and_gradients(case, distill):
    hidden, head, targets, weights, teacher = case
    args = (targets, weights, teacher if distill else None)

    def scaled(loss):  # a cotangent other than one
        return lambda hidden, head: 3 * loss(hidden, head, *args, distill)

    want, want_grads = jax.value_and_grad(scaled(naive), argnums=(0, 1))(hidden, head)
    got, grads = jax.jit(jax.value_and_grad(scaled(lm_loss), argnums=(0, 1)))(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(3 * lm_loss(hidden, head, *args, distill), want, rtol=1e-5)  # not differentiated
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_position_of_weight_zero_counts_for_nothing(case):
    hidden, head, targets, _, _ = case
    weights = jnp.ones((BATCH, LENGTH)).at[1, 3:].set(0.0)
    spoiled = hidden.at[1, 3:].set(7.0)
    assert lm_loss(hidden, head, targets, weights, None, 0.0) == lm_loss(spoiled, head, targets, weights, None, 0.0)
    d_hidden = jax.grad(lm_loss)(hidden, head, targets, weights, None, 0.0)
    assert not np.asarray(d_hidden)[1, 3:].any() and np.asarray(d_hidden)[0].any()


def test_it_is_a_mean_whatever_the_weights_sum_to(case):
    hidden, head, targets, weights, _ = case
    want = lm_loss(hidden, head, targets, weights, None, 0.0)
    np.testing.assert_allclose(lm_loss(hidden, head, targets, weights / 1000, None, 0.0), want, rtol=1e-5)
    nothing = lm_loss(hidden, head, targets, jnp.zeros_like(weights), None, 0.0)
    assert nothing == 0.0


def test_token_losses(case):
    hidden, head, targets, _, _ = case
    logs = jax.nn.log_softmax(hidden @ head.T, axis=-1)
    want = -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(token_losses(hidden, head, targets), want, atol=1e-5)


def test_bfloat16_hidden_states_keep_float32_loss_and_head_gradient(case):
    hidden, head, targets, weights, teacher = case
    exact = hidden.astype(jnp.bfloat16).astype(jnp.float32)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    want, want_grads = jax.value_and_grad(naive, argnums=(0, 1))(exact, rounded, targets, weights, teacher, 0.5)
    low = hidden.astype(jnp.bfloat16)
    got, grads = jax.value_and_grad(lm_loss, argnums=(0, 1))(low, head, targets, weights, teacher, 0.5)
    assert got.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)  # logits of rounded inputs are exact in float32
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * float(np.abs(b).max()))


def test_a_long_batch_is_a_loop_and_not_a_program_of_every_block():
    """128 x 4096 positions: the program's size does not grow with the number of blocks."""

    def size(length):
        rows, head = jax.ShapeDtypeStruct((128, length), jnp.int32), jax.ShapeDtypeStruct((VOCAB, WIDTH), jnp.float32)
        hidden = jax.ShapeDtypeStruct((128, length, WIDTH), jnp.bfloat16)
        weights = jax.ShapeDtypeStruct((128, length), jnp.float32)
        both = jax.jit(jax.value_and_grad(lambda h, w, t, m: lm_loss(h, w, t, m, None, 0.0), argnums=(0, 1)))
        return len(both.lower(hidden, head, rows, weights).as_text().splitlines())

    assert size(4096) == size(64)
