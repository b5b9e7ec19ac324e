"""The whole-sequence model that served log-probabilities are compared with: no caches, experts masked by the routes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import config
from readme_jax.models.experts import plan_batch
from readme_jax.models.llama import Llama, head_weight
from readme_jax.models.router import Router, choose
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import make_mesh


class Masked:
    """Log-probabilities [T, V] of every position of a sequence of at most `length` tokens."""

    def __init__(self, model: Any, length: int) -> None:
        mixture = getattr(model, "mixture", None)
        backbone = Llama(model.config, mixture, Runtime(segments="masked"))

        @jax.jit
        def forward(ids):
            plan = None
            if mixture:
                if model.router is None:
                    chosen, weights = jnp.zeros((*ids.shape, 1), jnp.int32), jnp.ones((*ids.shape, 1))
                else:
                    logits, _ = Router(model.router_config).apply({"params": model.router}, ids)
                    chosen, weights = choose(logits, mixture.top_k)
                plan = plan_batch(chosen, mixture.num_experts, weights)
            hidden, _ = backbone.apply({"params": model.params}, ids, plan, getattr(model, "channels", None))
            return jax.nn.log_softmax(hidden[0] @ head_weight(model.params).T)

        self.forward, self.length = forward, length

    def __call__(self, tokens: list[int]) -> np.ndarray:
        padded = jnp.asarray([tokens + [0] * (self.length - len(tokens))])
        with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
            return np.asarray(self.forward(padded))[: len(tokens)]
