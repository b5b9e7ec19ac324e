"""The whole refactoring of a dense model: calibrate, select, slice, refit.

# D model width, E experts, F dense FFN width, L layers, n sequences, T length
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import config
from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.models.runtime import Runtime
from readme_jax.refactor import refit, select
from readme_jax.refactor.calibrate import Tick, channel_statistics, residual_streams
from readme_jax.refactor.groups import group_text
from readme_jax.refactor.slice import lay_out, slice_layer

Params = Mapping[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sliced:
    """A mixture cut from a dense model, untuned: its shape, unrolled parameters, channels, and facts for the report."""

    mixture: MixtureConfig
    params: dict[str, Any]
    channels: dict[str, Any]
    facts: dict[str, Any]


def convert(
    params: Params,
    model: ModelConfig,
    calibration: Mapping[str, np.ndarray],
    settings: config.Slice,
    runtime: Runtime,
    tick: Tick = lambda n: None,
    keep: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Sliced:
    """Cut a dense model (unrolled tree) into one expert a domain, or one in all (`experts='one'`: the dense slice), or
    as refactor/groups.py says for `num_experts`.

    `calibration` holds tokens [n, T] of each domain. Runs under a mesh. `tick` is told of tokens read; `keep` is given
    each layer once it is cut, and may move it. Of `params` a layer is asked for at a time (`loading.LayerByLayer`), so
    that no more than two dense layers and one cut one need lie on the devices.
    """
    width = max(1, round(settings.width * model.ffn_dim))
    grouping = group_text(calibration, settings)
    calibration, groups = grouping.parts(calibration), grouping.groups
    permanent = settings.permanent and len(groups) > 1
    if settings.refit == "none" and settings.score != "obs":
        masks = _masks_by_statistics(params, model, calibration, groups, width, settings, runtime, tick)
        downs: list[dict[str, np.ndarray]] = [{} for _ in range(model.num_layers)]
    else:
        cut = _Layerwise(model, calibration, groups, width, permanent, settings, runtime, tick)
        masks, downs = cut.run(params)
    mixture, channels = lay_out(masks, permanent, settings.tied, settings.top_k, settings.align)
    sliced = {
        k: keep(slice_layer(v, channels[k], mixture, downs[int(k.removeprefix("layers_"))])) if k in channels else v
        for k, v in params.items()
    }
    shared = masks.all(axis=1).mean(axis=-1) if permanent else np.zeros(model.num_layers)
    facts = {
        "domains": list(grouping.domains),
        "experts": grouping.names,
        "width": width,
        "overlap": select.overlap(masks).tolist(),
        "permanent_share": shared.tolist(),
        "calibration_tokens": int(sum(t.size for t in calibration.values())),
    }
    return Sliced(mixture, sliced, channels, facts)


def _masks_by_statistics(
    params: Params,
    model: ModelConfig,
    calibration: Mapping[str, np.ndarray],
    groups: list[list[str]],
    width: int,
    settings: config.Slice,
    runtime: Runtime,
    tick: Tick,
) -> np.ndarray:
    """Masks [L, E, F] by mean |a| or rmsw: two vectors a layer, streamed through the whole model."""
    of = {
        d: channel_statistics(params, model, runtime, tokens, settings.calibration_batch, tick)
        for d, tokens in calibration.items()
    }
    masks = np.zeros((model.num_layers, len(groups), model.ffn_dim), bool)
    for layer in range(model.num_layers):
        down = None if settings.score == "mean_abs" else np.asarray(params[f"layers_{layer}"]["ffn"]["down"])
        for e, group in enumerate(groups):
            shares = np.array([calibration[d].size for d in group], np.float64)
            mean_abs = np.average([of[d].mean_abs[layer] for d in group], axis=0, weights=shares)
            square = np.average([of[d].rms[layer] ** 2 for d in group], axis=0, weights=shares)
            scores = mean_abs if down is None else select.rmsw(np.sqrt(square), down)
            masks[layer, e] = select.top_channels(scores, width)
    return masks


class _Layerwise:
    """Selection and refit one layer at a time, holding residual streams at that layer's door (2 * n * T * D a domain).

    Streams are of the dense model and, when sequential, of the model cut so far; one layer's moments live at a time.
    """

    def __init__(
        self,
        model: ModelConfig,
        calibration: Mapping[str, np.ndarray],
        groups: list[list[str]],
        width: int,
        permanent: bool,
        settings: config.Slice,
        runtime: Runtime,
        tick: Tick,
    ) -> None:
        self.model, self.calibration, self.groups, self.width = model, calibration, groups, width
        self.permanent, self.settings, self.runtime, self.tick = permanent, settings, runtime, tick
        self.sequential = settings.refit == "sequential"

    def run(self, params: Params) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
        """Masks [L, E, F], and the refitted W_down of each layer's parts by name (none without refit)."""
        self.dense = {d: self._start(params, d) for d in self.calibration}
        self.sliced = {d: self._start(params, d) for d in self.calibration} if self.sequential else {}
        masks, downs = [], []
        for layer in range(self.model.num_layers):
            p = params[f"layers_{layer}"]
            moments = select.shared_moments([self._observe(p, group) for group in self.groups], self.settings.share)
            mask = np.stack([self._select(m, p) for m in moments])
            shared = select.permanent_channels(mask) if self.permanent else np.zeros(self.model.ffn_dim, bool)
            masks.append(mask)
            downs.append({} if self.settings.refit == "none" else self._refit(p, moments, mask, shared))
        return np.stack(masks), downs

    def _start(self, params: Params, domain: str) -> list[jax.Array]:
        return residual_streams(params, self.runtime, self.calibration[domain], self.settings.calibration_batch)

    def _observe(self, p: Params, group: list[str]) -> select.Moments:
        moments = refit.no_moments(self.model)
        for domain in group:
            for i, dense in enumerate(self.dense[domain]):
                sliced = self.sliced[domain][i] if self.sequential else None
                moments, self.dense[domain][i], after = refit.observe(
                    moments, p, dense, sliced, self.model, self.runtime, self.sequential
                )
                if self.sequential:
                    self.sliced[domain][i] = after
                self.tick(dense.shape[0] * dense.shape[1] // self.model.num_layers)
        return moments if self.sequential else refit.one_shot(moments, p["ffn"]["down"])

    def _select(self, moments: select.Moments, p: Params) -> np.ndarray:
        if self.settings.score == "obs":
            scores = np.asarray(select.obs(moments, self.settings.ridge, self.width))
        elif self.settings.score == "rmsw":
            scores = select.rmsw(np.sqrt(np.diagonal(moments.gram)), np.asarray(p["ffn"]["down"]))
        else:
            scores = np.asarray(moments.absolute)
        return select.top_channels(scores, self.width)

    def _refit(
        self, p: Params, moments: list[select.Moments], mask: np.ndarray, shared: np.ndarray
    ) -> dict[str, np.ndarray]:
        common, owns = refit.refit_jointly(moments, mask, shared, jnp.asarray(p["ffn"]["down"]), self.settings.ridge)
        for group, own, keep in zip(self.groups, owns, mask, strict=True):
            down, kept = own if common is None else own + common, np.flatnonzero(keep)
            for domain in group if self.sequential else ():
                for i, stream in enumerate(self.sliced[domain]):
                    self.sliced[domain][i] = refit.advance(p, kept, down, stream, self.model, self.runtime)
        parts = {f"experts_{e}": np.asarray(own)[:, mask[e] & ~shared] for e, own in enumerate(owns)}
        return parts if common is None else parts | {"permanent": np.asarray(common)[:, shared]}
