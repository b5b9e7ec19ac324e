"""Router tuning of the conventional router (models/layerwise.py): every layer's gate learns that layer's own targets.

# B batch, T length, D model width, E experts, L layers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from readme_jax.config import ModelConfig, RouterStage
from readme_jax.models.layerwise import gate_logits
from readme_jax.models.runtime import Runtime
from readme_jax.tuning import distill

Params = Mapping[str, Any]


def layerwise_loss(
    gates: jax.Array, batch: Mapping[str, jax.Array], frozen: Params, model: ModelConfig, runtime: Runtime,
    stage: RouterStage,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The objective of `stage`, mean over layers, of gates [L, E, D] on the frozen dense model's hidden states.

    `overlap` and `released` compare a layer's logits with that layer's scores alone, `domain` with the text's domain.
    `frozen` holds `backbone` (dense) and `channels` in the runtime's layout.
    """
    backbone, channels = jax.lax.stop_gradient((frozen["backbone"], frozen["channels"]))
    score = distill.released_overlap if stage.objective == "released" else distill.half_overlap

    def read(y: jax.Array, a: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, gate = each
        y, a = jax.lax.stop_gradient((y, a))
        scores = jnp.zeros((*y.shape[:2], rows.shape[0])) if stage.objective == "domain" else score(a, rows)
        return gate_logits(gate, y), scores

    if "layers" in backbone:
        each: Any = (channels["layers"]["experts"], gates)
    else:
        each = [(channels[f"layers_{i}"]["experts"], gates[i]) for i in range(model.num_layers)]
    logits, scores = distill.over_layers(backbone, model, runtime, batch["tokens"], read, each)
    if stage.objective == "domain":
        value = jax.vmap(distill.domain_loss, (0, None))(logits, batch["domain"]).mean()
    elif stage.objective == "released":
        value = distill.released_loss(logits, scores)
    else:
        value = distill.eq4_loss(logits, scores, stage.temperature, stage.kl)
    switches = jax.vmap(distill.switch_rate)(logits).mean()
    return value + stage.switch_price * switches, {"switch_rate": switches}
