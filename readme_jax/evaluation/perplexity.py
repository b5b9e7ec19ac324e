"""Token losses and perplexity by domain, of a dense model or of a mixture under any routes.

# B batch, T window length, D domains, E experts, K experts a token, n windows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.errors import DataError
from readme_jax.models.cross_entropy import token_losses
from readme_jax.models.experts import plan_batch
from readme_jax.models.llama import Llama, head_weight
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import batch_ways, put_batch, replicated
from readme_jax.tuning.routes import LayerwiseRoutes, gated

Params = Mapping[str, Any]
Tick = Callable[[int], None]
Label = Callable[[np.ndarray, int], int | np.ndarray]


class Losses(NamedTuple):
    """Of windows [n, T]: nats [n, T - 1] of every token after the first, experts [n, T, K] of all.

    None of a dense model, and where each layer has its own.
    """

    nats: np.ndarray
    experts: np.ndarray | None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(float(self.nats.mean(dtype=np.float64)))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that a ratio between two models keeps. Raises ValueError when there are no values."""
    logs = [math.log(v) for v in values]
    if not logs:
        raise ValueError("the geometric mean of no values")
    return math.exp(sum(logs) / len(logs))


@lru_cache(maxsize=4)
def _program(config: ModelConfig, mixture: MixtureConfig | None, runtime: Runtime, mesh: Any) -> Any:
    """(params, channels, routes, batch) -> (nats, experts), for all evaluators of one model shape."""

    def losses(params: Params, channels: Any, routes: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        tokens, plan, experts = batch["tokens"], None, None
        if isinstance(routes, LayerwiseRoutes):
            channels = gated(channels, routes)
        elif mixture is not None:
            experts, weights = routes(tokens, batch["domain"])
            plan = plan_batch(experts, mixture.num_experts, weights if mixture.top_k > 1 else None)
        hidden, _ = Llama(config, mixture, runtime).apply({"params": params}, tokens, plan, channels)
        targets = jnp.roll(tokens, -1, axis=1)
        return token_losses(hidden, head_weight(params), targets)[:, :-1], experts

    whole = replicated(mesh)  # of several processes each can read all of it
    return jax.jit(losses, out_shardings=(whole, whole if mixture is not None else None))


class Evaluator:
    """Losses of one model shape: compiled once a window shape, batches sharded over the mesh.

    Parameters come with each call, in the layout of `runtime`; routes are a pytree (tuning/routes.py), so other
    weights of the same kind of routes compile nothing anew.
    """

    def __init__(
        self, config: ModelConfig, mixture: MixtureConfig | None, runtime: Runtime, mesh: Any, batch: int = 4
    ) -> None:
        """`batch` windows a step, rounded up to the devices that share a batch."""
        ways = batch_ways(mesh)
        self.batch = -(-batch // ways) * ways
        self.mesh, self.mixture = mesh, mixture
        self._step = _program(config, mixture, runtime, mesh)

    def losses(
        self,
        params: Params,
        windows: np.ndarray,
        routes: Any = None,
        channels: Params | None = None,
        domain: int | np.ndarray = 0,
        tick: Tick = lambda tokens: None,
    ) -> Losses:
        """Losses of windows [n, T] int32, all of one domain or each of its own [n] (which routes by domain look at).

        A mixture needs `routes`, and `channels` when it is tied. `tick` is told of tokens read. Raises DataError when
        there is no window.
        """
        if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
            raise DataError(f"windows of shape {windows.shape}: expected [n, T] with n > 0 and T > 1")
        if (self.mixture is None) != (routes is None):
            raise ValueError("routes belong to a mixture, and a mixture needs them")
        nats, experts = [], []
        labels = np.broadcast_to(np.asarray(domain, np.int32), (len(windows),))
        for start in range(0, len(windows), self.batch):
            rows = windows[start : start + self.batch]
            missing = self.batch - len(rows)
            full = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
            of = np.pad(labels[start : start + self.batch], (0, missing), mode="edge")
            with jax.set_mesh(self.mesh):
                batch = put_batch({"tokens": full, "domain": of}, self.mesh)
                out = self._step(params, channels, routes, batch)
            nats.append(np.asarray(out[0])[: len(rows)])
            experts.append(None if out[1] is None else np.asarray(out[1])[: len(rows)])
            tick(rows.size)
        chosen = [e for e in experts if e is not None]
        return Losses(np.concatenate(nats), np.concatenate(chosen) if chosen else None)

    def domains(
        self,
        params: Params,
        validation: Mapping[str, np.ndarray],
        routes: Any = None,
        channels: Params | None = None,
        tick: Tick = lambda tokens: None,
        label: Label = lambda windows, domain: domain,
    ) -> dict[str, Losses]:
        """Losses of each domain's validation windows; domains count from 0 in the order of `validation`.

        `label(windows, domain)` is what routes by domain see in place of the domain.
        """
        return {
            name: self.losses(params, windows, routes, channels, label(windows, i), tick)
            for i, (name, windows) in enumerate(validation.items())
        }


def perplexities(losses: Mapping[str, Losses]) -> dict[str, float]:
    """Perplexity of each domain."""
    return {name: each.perplexity for name, each in losses.items()}
