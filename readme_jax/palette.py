"""One colour an expert, in the terminal and in reports alike."""

from __future__ import annotations

# Okabe and Ito's colours, which people with any colour vision can tell apart, then more of their kind.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#999933", "#882255", "#777777",
)  # fmt: skip


def colour(expert: int) -> str:
    """The colour of an expert, as #rrggbb."""
    return PALETTE[expert % len(PALETTE)]
