"""Drawing rules of the report: one palette, and SVG that takes its ink from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Each model has one colour and one marker everywhere.
MODELS = {
    "dense": ("Dense", "#777777", "D"),
    "sliced": ("Sliced, untuned", "#e69f00", "^"),
    "tuned": ("Read-ME, tuned", "#0072b2", "o"),
    "dense_slice": ("Dense slice, tuned", "#d55e00", "s"),
}
# Placeholders that no drawing uses, replaced by the page's own colours.
_INK, _MUTED, _GRID = "#010203", "#040506", "#070809"
_PAGE_COLOURS = {_INK: "currentColor", _MUTED: "var(--muted)", _GRID: "var(--line)"}
MUTED = _MUTED
_RC: Any = {
    "svg.fonttype": "none",  # real text: selectable, and in the page's font
    "svg.hashsalt": "readme-jax",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


Plot = TypeVar("Plot", bound=Callable[..., str])


def styled(plot: Plot) -> Plot:
    """A plotting function that draws by the rules above, whatever the process's own settings are."""

    @wraps(plot)
    def drawn(*args: Any, **kwargs: Any) -> str:
        with matplotlib.rc_context(_RC):
            return plot(*args, **kwargs)

    return cast(Plot, drawn)


def figure(width: float, height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A transparent figure in inches and its axes."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, 1, **options)
    fig.patch.set_alpha(0)
    for ax in [axes] if rows == 1 else axes:
        ax.patch.set_alpha(0)
    return fig, axes


def svg(fig: Figure, label: str) -> str:
    """The figure as inline SVG, described by `label` for screen readers."""
    out = io.StringIO()
    FigureCanvasSVG(fig).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, colour in _PAGE_COLOURS.items():
        text = text.replace(placeholder, colour)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{escaped}" ', text, count=1)


def ink_on(face: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = matplotlib.colors.to_rgb(face)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#101418"


def heatmap(
    ax: Any,
    values: np.ndarray,
    shade: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    form: str,
) -> None:
    """Cells of `values` written with `form`, coloured by `shade` in [0, 1] (1 darkest)."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xlim(0, len(columns))
    ax.set_ylim(len(rows), 0)
    shades = matplotlib.colormaps["Blues"]
    for i in range(len(rows)):
        for j in range(len(columns)):
            face = matplotlib.colors.to_hex(shades(0.08 + 0.84 * min(max(float(shade[i][j]), 0.0), 1.0)))
            ax.fill([j, j + 0.97, j + 0.97, j], [i, i, i + 0.95, i + 0.95], color=face, linewidth=0)
            text = format(values[i][j], form)
            ax.text(j + 0.485, i + 0.475, text, ha="center", va="center", color=ink_on(face), fontsize=9)
    slanted = max(map(len, columns)) > 6
    ax.set_xticks([j + 0.485 for j in range(len(columns))], columns)
    ax.tick_params(axis="both", length=0)
    for label in ax.get_xticklabels():
        label.set(rotation=30 if slanted else 0, ha="right" if slanted else "center", rotation_mode="anchor")
    ax.set_yticks([i + 0.475 for i in range(len(rows))], rows)
