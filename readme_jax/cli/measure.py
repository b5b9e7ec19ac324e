"""Perplexity of any checkpoint on any text folder."""

from __future__ import annotations

import jax

from readme_jax import config
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.cli.sources import expert_names, open_model, tokenizer_of
from readme_jax.data.corpus import open_corpus
from readme_jax.errors import CheckpointError, ConfigError
from readme_jax.evaluation.perplexity import Evaluator, Losses
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh
from readme_jax.progress import meter
from readme_jax.tuning.routes import DomainRoutes, LayerwiseRoutes, RouterRoutes, routes_of


def measure(
    checkpoint: str, data: str, domains: tuple[str, ...], tokens: int, window: int, batch: int
) -> tuple[dict[str, Losses], list[str]]:
    """Losses of each domain's validation text, and the names of the experts (none: a dense model)."""
    if window < 2 or batch < 1:
        raise ConfigError(f"--window {window} --batch {batch}: a window takes two tokens, a step one window at least")
    text = config.Data(folder=data, domains=domains, sequence_length=window, validation_tokens=tokens)
    model = open_model(checkpoint)
    corpus = open_corpus(text, tokenizer_of(model, checkpoint))
    validation = {domain: corpus.validation(domain, window) for domain in corpus.domains}
    mixture = model if isinstance(model, Mixture) else None
    mesh = make_mesh(config.Mesh())
    evaluator = Evaluator(model.config, mixture.mixture if mixture else None, runtime_for(config.Model()), mesh, batch)
    routes = own_routes(mixture) if mixture else None
    channels = mixture.channels if mixture else None
    with jax.set_mesh(mesh), meter("perplexity", sum(w.size for w in validation.values())) as tick:
        params = jax.tree.map(jax.numpy.asarray, model.params)
        losses = evaluator.domains(params, validation, routes, channels, tick)
    return losses, expert_names(mixture) if mixture else []


def own_routes(mixture: Mixture) -> RouterRoutes | LayerwiseRoutes | DomainRoutes:
    """The routes a mixture is served with: its router's, or of one expert the only ones."""
    if mixture.mixture.num_experts == 1:
        return DomainRoutes(1)
    if mixture.router is None or mixture.router_config is None:
        raise CheckpointError(f"a mixture of {mixture.mixture.num_experts} experts without a router has no routes")
    router = jax.tree.map(jax.numpy.asarray, mixture.router)
    return routes_of(router, mixture.router_config, mixture.mixture.top_k)
