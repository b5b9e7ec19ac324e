"""TPU chips: peak rates that a roofline divides by, and the links between chips of a topology."""

from __future__ import annotations

import re
from dataclasses import dataclass

from readme_jax.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip: bf16 FLOP/s, bytes of HBM and its bytes/s, bytes/s of a link one way.

    An axis of the torus closes into a ring where its length is a multiple of `ring`.
    """

    flops: float
    hbm: float
    hbm_rate: float
    link: float
    ring: int


# Vendor's figures for FLOP/s and HBM; links as measured one way in practice, a little under the vendor's sums.
CHIPS = {
    "v4": Chip(275e12, 32e9, 1228e9, 4.5e10, 4),
    "v5e": Chip(197e12, 16e9, 819e9, 4.5e10, 16),
    "v5p": Chip(459e12, 95e9, 2765e9, 9e10, 4),
    "v6e": Chip(918e12, 32e9, 1640e9, 9e10, 16),
}


@dataclass(frozen=True)
class Topology:
    """`v5p:4x4x4`: a kind of chip and the torus that they form."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Bytes/s that a chip receives along each axis of the torus: both ways round a ring, one along a line."""
        return tuple(self.chip.link * (2 if n % self.chip.ring == 0 else 1) for n in self.shape)


def topology(name: str) -> Topology:
    """A topology by name. Raises ConfigError on one that is not known."""
    found = re.fullmatch(r"(v\w+):(\d+(?:x\d+){1,2})", name)
    if found is None or found[1] not in CHIPS:
        raise ConfigError(f"topology {name!r}: give one of {', '.join(CHIPS)} and its shape, such as v5p:4x4x4")
    return Topology(name, CHIPS[found[1]], tuple(int(n) for n in found[2].split("x")))
