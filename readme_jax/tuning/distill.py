"""What the router learns from: targets measured on a frozen backbone, and the losses of each objective.

Targets are per token and expert; none needs a gradient through the backbone.

# B batch, T length, L layers, E experts, F dense FFN width, d exclusive rows of one expert
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.models.cross_entropy import token_losses
from readme_jax.models.experts import plan_batch
from readme_jax.models.feed_forward import activations, linear
from readme_jax.models.llama import Llama, attend, embed_tokens, head_weight, prepare, rms_norm
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import constrain
from readme_jax.tuning.ranking import top_mask

Params = Mapping[str, Any]
Score = Callable[[jax.Array, jax.Array], jax.Array]  # activations [B, T, F], experts' rows [E, d] -> [B, T, E]

RELEASED_SCALE = 10.0  # the released code multiplies its scores by this before the softmax
RELEASED_SMOOTHING = 0.5
RELEASED_HARD = 0.75  # share of the cross-entropy with the best expert; the rest is with the soft target


# --- overlap of a token's channels with each expert ---------------------------------------------------------------


def _members(rows: jax.Array, ffn_dim: int) -> jax.Array:
    """Rows [E, d] padded with F as 0/1 columns [F, E]."""
    rows = jnp.asarray(rows)
    columns = jnp.zeros((ffn_dim, rows.shape[0]), jnp.float32)
    return columns.at[rows, jnp.arange(rows.shape[0])[:, None]].set(1.0, mode="drop")


def half_overlap(a: jax.Array, rows: jax.Array) -> jax.Array:
    """Eq. 4's score |M0 and M_j|: how many of a token's own F/2 largest |a| expert j holds exclusively.

    a [B, T, F], rows [E, d] (padded with F) -> [B, T, E] counts. Exactly half the channels count, ties broken by index.
    """
    return top_mask(jnp.abs(a), a.shape[-1] // 2).astype(jnp.float32) @ _members(rows, a.shape[-1])


def released_overlap(a: jax.Array, rows: jax.Array) -> jax.Array:
    """The released code's score: signed activations ranked at five thresholds, overlaps weighted 1/(3N) and added.

    The thresholds are the N - 1, 4N/5, 3N/5, 2N/5 and N/5 largest channels, N the exclusive width of an expert without
    its padding. a [B, T, F], rows [E, d] -> [B, T, E].
    """
    rows = jnp.asarray(rows)
    width = jnp.max(jnp.sum(rows < a.shape[-1], axis=-1))
    thresholds = [width - 1, *(width * i // 5 for i in (4, 3, 2, 1))]
    nested = sum(top_mask(a, jnp.maximum(k, 0)).astype(jnp.float32) for k in thresholds)
    return nested @ _members(rows, a.shape[-1]) / (3 * jnp.maximum(width, 1))


def overlap_scores(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    channels: Params,
    tokens: jax.Array,
    score: Score = half_overlap,
) -> jax.Array:
    """Scores [L, B, T, E] of tokens [B, T] from one forward pass of a dense model, its activations never kept.

    `params` and `channels` are both unrolled or both scanned. Runs under a mesh.
    """
    if "layers" in params:
        rows = channels["layers"]["experts"]
    else:
        rows = [channels[f"layers_{i}"]["experts"] for i in range(config.num_layers)]
    return over_layers(params, config, runtime, tokens, lambda y, a, rows: score(a, rows), rows)


def over_layers(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    tokens: jax.Array,
    read: Callable[[jax.Array, jax.Array, Any], Any],
    each: Any,
) -> Any:
    """One forward pass of a dense model over tokens [B, T]; what `read` says of each layer, stacked along a first axis.

    `read(y, a, each of that layer)` sees the normed input y [B, T, D] and the channels' activations a [B, T, F] of its
    feed-forward part. `each` has L entries where `params` are unrolled, a leading axis L where they are scanned.
    """
    ctx = prepare(config, tokens)

    def layer(x: jax.Array, p: Params, each: Any) -> tuple[jax.Array, Any]:
        p = jax.tree.map(lambda w: w.astype(runtime.dtype), dict(p))
        x, _ = attend(p, config, runtime, x, ctx)
        y = rms_norm(x, p["ffn_norm"], config.norm_eps)
        a = activations(p["ffn"], y)
        return constrain(x + linear(a, p["ffn"]["down"]), "batch", "length", None), read(y, a, each)

    x = embed_tokens(params["embed"].astype(runtime.dtype), tokens)
    if "layers" in params:
        _, out = jax.lax.scan(lambda x, both: layer(x, *both), x, (params["layers"], each))
        return out
    by_layer = []
    for i in range(config.num_layers):
        x, out = layer(x, params[f"layers_{i}"], each[i])
        by_layer.append(out)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *by_layer)


def merged_dense(dense: Params, mixture: Params, channels: Params) -> dict[str, Any]:
    """A tuned mixture as one dense model, on which overlap with the current backbone is counted (`targets='tuned'`).

    Unrolled trees in and out. Attention, norms and embeddings are the mixture's; a channel is the mean of its copies
    in the experts that hold it, or the dense model's where none does. A tied mixture is its own dense FFN.
    """
    merged: dict[str, Any] = {}
    for name, p in mixture.items():
        merged[name] = p
        if not name.startswith("layers_") or "ffn" in p:
            continue
        width = dense[name]["ffn"]["gate"].shape[0]
        parts = [(p[f"experts_{e}"], rows) for e, rows in enumerate(channels[name]["experts"])]
        if "permanent" in p:
            parts.append((p["permanent"], channels[name]["permanent"]))
        merged[name] = {k: v for k, v in p.items() if k != "permanent" and not k.startswith("experts_")}
        merged[name]["ffn"] = {
            k: _mean_of_copies(w, [(part[k], rows) for part, rows in parts], width, axis=1 if k == "down" else 0)
            for k, w in dense[name]["ffn"].items()
        }
    return merged


def _mean_of_copies(dense: jax.Array, parts: list[tuple[jax.Array, jax.Array]], width: int, axis: int) -> jax.Array:
    total, copies = jnp.zeros_like(jnp.moveaxis(dense, axis, 0)), jnp.zeros(width)
    for part, rows in parts:
        total = total.at[rows].add(jnp.moveaxis(part, axis, 0), mode="drop")
        copies = copies.at[rows].add(1.0, mode="drop")
    mean = jnp.moveaxis(total / jnp.maximum(copies, 1)[:, None], 0, axis)
    held = copies > 0
    return jnp.where(held[:, None] if axis == 0 else held, mean, dense)


# --- the experts' own losses --------------------------------------------------------------------------------------


def expert_losses(
    params: Params, config: ModelConfig, mixture: MixtureConfig, runtime: Runtime, channels: Params, tokens: jax.Array
) -> jax.Array:
    """Next-token loss in nats of every position under each expert, [B, T, E]: E forward passes of the frozen mixture.

    In pass e every token of the batch runs expert e, so a position's loss is that of a context all of one expert, as it
    nearly is once a router repeats itself. The last position of a row has no next token: 0.
    """
    model = Llama(config, mixture, runtime)

    def under(expert: jax.Array) -> jax.Array:
        plan = plan_batch(jnp.full((*tokens.shape, 1), expert, jnp.int32), mixture.num_experts)
        hidden, _ = model.apply({"params": params}, tokens, plan, channels)
        losses = token_losses(hidden[:, :-1], head_weight(params), tokens[:, 1:])
        return jnp.pad(losses, ((0, 0), (0, 1)))

    return jnp.moveaxis(jax.lax.map(under, jnp.arange(mixture.num_experts)), 0, -1)


# --- losses of the router: all scalars, means over tokens ---------------------------------------------------------


def eq4_loss(
    logits: jax.Array,
    scores: jax.Array,
    temperature: float,
    kl: Literal["router_target", "target_router"] = "router_target",
) -> jax.Array:
    """Eq. 4: divergence between the router and softmax(scores / temperature), mean over layers and tokens.

    logits [B, T, E] of the one router, scores [L, B, T, E] overlap counts. Counts run up to an expert's exclusive width
    (hundreds), where a softmax saturates: they are divided by `temperature` and scaled by nothing else. The paper
    writes KL(router || target); `target_router` is the other direction.
    """
    router = jax.nn.log_softmax(logits, axis=-1)
    target = jax.nn.log_softmax(scores / temperature, axis=-1)
    p, q = (router, target) if kl == "router_target" else (target, router)
    return (jnp.exp(p) * (p - q)).sum(-1).mean()


def released_loss(logits: jax.Array, scores: jax.Array) -> jax.Array:
    """The released code's loss on `released_overlap` scores [L, B, T, E], mean over layers and tokens.

    0.75 of the cross-entropy with the best expert (label smoothing 0.5), 0.25 with softmax(10 * scores).
    """
    router = jax.nn.log_softmax(logits, axis=-1)
    experts = logits.shape[-1]
    hard = jax.nn.one_hot(jnp.argmax(scores, axis=-1), experts)
    hard = (1 - RELEASED_SMOOTHING) * hard + RELEASED_SMOOTHING / experts
    soft = jax.nn.softmax(RELEASED_SCALE * scores, axis=-1)
    target = RELEASED_HARD * hard + (1 - RELEASED_HARD) * soft
    return -(target * router).sum(-1).mean()


def domain_loss(logits: jax.Array, domain: jax.Array) -> jax.Array:
    """Cross-entropy of every token's logits [B, T, E] with its sequence's domain [B]: expert i is domain i's."""
    router = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(router, domain[:, None, None], axis=-1).mean()


def expected_loss(logits: jax.Array, losses: jax.Array) -> jax.Array:
    """The loss to expect when experts are drawn from softmax(logits): logits and `expert_losses` both [B, T, E].

    Means over positions with a next token: the last of each row has none.
    """
    return (jax.nn.softmax(logits, axis=-1) * losses)[:, :-1].sum(-1).mean()


def switch_rate(logits: jax.Array) -> jax.Array:
    """Expected rate of expert changes between neighbouring tokens, 1 - sum_e p_t(e) p_t-1(e), of logits [B, T, E]."""
    p = jax.nn.softmax(logits, axis=-1)
    if p.shape[1] < 2:
        return jnp.zeros((), p.dtype)
    return 1 - (p[:, 1:] * p[:, :-1]).sum(-1).mean()


def overlap_share(experts: np.ndarray, scores: np.ndarray) -> float:
    """Share of tokens whose expert [B, T] has the highest overlap score summed over layers, scores [L, B, T, E]."""
    total = scores.sum(0)
    picked = np.take_along_axis(total, experts[..., None], axis=-1)[..., 0]
    return float((picked >= total.max(-1)).mean())
