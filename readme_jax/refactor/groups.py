"""Which text makes which expert, where there are not as many experts as domains.

Fewer: neighbouring domains, in the order of `Data.domains`, share an expert (seven in four: 2 + 2 + 2 + 1). More, a
multiple: each domain's text is cut into as many parts of equal size by what its sequences hold. Sequences are ordered
along the axis in which their token counts differ most (the first principal axis, over hashed token ids) and cut at the
quantiles of the calibration text; a new sequence belongs where it falls on that axis. No label of the text is needed
beyond its domain.

# n sequences, T length, D domains, E experts, P parts of a domain
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from readme_jax import config
from readme_jax.errors import ConfigError

BUCKETS = 512  # of hashed token ids
_MULTIPLIER = np.uint32(2654435761)  # spreads neighbouring ids over the buckets
_ROUNDS = 50  # of the power iteration: the axis need not be exact, only the same everywhere


def expert_count(settings: config.Slice, domains: int) -> int:
    """Experts for so many domains. Raises ConfigError where they cannot be made of them."""
    if settings.experts == "one":
        return 1
    wanted = settings.num_experts or domains
    if wanted > domains and wanted % domains:
        raise ConfigError(
            f"Slice.num_experts = {wanted}: with {domains} domains it must be at most {domains} or a multiple of it"
        )
    return wanted


def histograms(tokens: np.ndarray) -> np.ndarray:
    """Square roots of hashed token shares of sequences [n, T]: float64 [n, 512], rows of length 1."""
    hashed = (tokens.astype(np.uint32) * _MULTIPLIER) >> np.uint32(23)
    counts = np.zeros((len(tokens), BUCKETS))
    np.add.at(counts, (np.arange(len(tokens))[:, None], hashed), 1)
    return np.sqrt(counts / tokens.shape[1])


@dataclass(frozen=True)
class Axis:
    """How one domain is cut: projections on `direction` [512], cut at `cuts` [P - 1], ascending."""

    direction: np.ndarray
    cuts: np.ndarray

    def part(self, tokens: np.ndarray) -> np.ndarray:
        """Part [n] of each sequence [n, T]."""
        return np.searchsorted(self.cuts, histograms(tokens) @ self.direction, side="right")


def principal_axis(tokens: np.ndarray, parts: int) -> Axis:
    """The axis along which sequences [n, T] differ most, and its quantiles."""
    counts = histograms(tokens)
    centred = counts - counts.mean(0)
    direction = centred[np.argmax((centred**2).sum(1))].copy()
    for _ in range(_ROUNDS):
        following = centred.T @ (centred @ direction)
        length = np.linalg.norm(following)
        if length == 0:
            break
        direction = following / length
    return Axis(direction, np.quantile(counts @ direction, np.arange(1, parts) / parts))


@dataclass(frozen=True)
class Grouping:
    """`members[e]` are the parts (domain, part) that expert e is cut for; `axes` cut domains where there are more."""

    domains: tuple[str, ...]
    members: tuple[tuple[tuple[int, int], ...], ...]
    axes: tuple[Axis, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the experts."""
        return ["+".join(self._part_name(d, p) for d, p in group) for group in self.members]

    def parts(self, calibration: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Calibration tokens [n, T] of each domain as those of each part, by name, in the order of `groups`."""
        if not self.axes:
            return dict(calibration)
        out = {}
        for d, (name, axis) in enumerate(zip(self.domains, self.axes, strict=True)):
            part = axis.part(calibration[name])
            for p in range(len(axis.cuts) + 1):
                out[self._part_name(d, p)] = calibration[name][part == p]
        return out

    @property
    def groups(self) -> list[list[str]]:
        """Names of the parts of each expert."""
        return [[self._part_name(d, p) for d, p in group] for group in self.members]

    def experts(self, tokens: np.ndarray, domain: np.ndarray) -> np.ndarray:
        """The expert [B] int32 of each sequence [B, T], given its domain [B]."""
        part = np.zeros(len(tokens), int)
        for d in np.unique(domain) if self.axes else ():
            part[domain == d] = self.axes[d].part(tokens[domain == d])
        of = {place: e for e, group in enumerate(self.members) for place in group}
        return np.array([of[int(d), int(p)] for d, p in zip(domain, part, strict=True)], np.int32)

    def _part_name(self, domain: int, part: int) -> str:
        return f"{self.domains[domain]}.{part + 1}" if self.axes else self.domains[domain]


def group_text(calibration: Mapping[str, np.ndarray], settings: config.Slice) -> Grouping:
    """The grouping of a run, a function of its calibration tokens [n, T] of each domain and its settings alone.

    Raises ConfigError where the experts cannot be made of these domains, or a part of one is empty.
    """
    domains = tuple(calibration)
    experts = expert_count(settings, len(domains))
    if experts <= len(domains):
        shares = np.array_split(np.arange(len(domains)), experts)
        return Grouping(domains, tuple(tuple((int(d), 0) for d in share) for share in shares))
    parts = experts // len(domains)
    axes = tuple(principal_axis(tokens, parts) for tokens in calibration.values())
    made = Grouping(domains, tuple(((d, p),) for d in range(len(domains)) for p in range(parts)), axes)
    for name, tokens in made.parts(calibration).items():
        if not len(tokens):
            raise ConfigError(
                f"Slice.num_experts = {experts}: {name} has no calibration text; raise Slice.calibration_tokens"
            )
    return made


class ByExpert:
    """Batches whose `domain` counts experts, not domains: what routes by label and the `domain` objective read."""

    def __init__(self, source: object, grouping: Grouping) -> None:
        self.source, self.grouping = source, grouping

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self.source[index]  # type: ignore[index]
        return batch | {"domain": self.grouping.experts(batch["tokens"], batch["domain"])}
