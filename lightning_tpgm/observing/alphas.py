"""The figure of a sweep over alphas, with matplotlib, which is installed by the extra ``plots``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_tpgm.observing.plotting import BLUE, GREY, ORANGE, axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_alphas(
    values: Mapping[float, float],
    monitor: str,
    best: float,
    chosen: float,
    tolerance: float,
    better: int,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """A metric over alpha, with what was chosen, and why.

    Args:
        values: The metric by alpha.
        monitor: Its name.
        best: The alpha with the best value.
        chosen: The alpha that was chosen.
        tolerance: Values that are by less worse than the best could be chosen.
        better: 1 if large values are good, -1 if small ones are.
        ax: Where to draw. None: a new figure.
    """
    figure, ax = axes_for(ax, width=4.8, height=3.6)
    alphas, top = sorted(values), values.get(best, math.nan)
    ax.plot(alphas, [values[alpha] for alpha in alphas], marker="o", color=BLUE)
    ax.axvline(chosen, linestyle=":", color=GREY)
    ax.set(xlabel="alpha (0: pretrained, 1: fine-tuned)", ylabel=monitor)
    ax.margins(y=0.2)
    side, away = ("left", 5) if chosen < 0.5 else ("right", -5)
    text = f"chosen and best: {chosen:g}" if chosen == best else f"chosen: {chosen:g}"
    at = chosen, 0.5 - 0.46 * better  # far from the best values
    _label(ax, text, at, (away, 0), side, better, GREY, ax.get_xaxis_transform())
    # on the better side of the best value there is no curve
    if tolerance > 0:
        ax.axhspan(top - max(better * tolerance, 0), top + max(-better * tolerance, 0), color=BLUE, alpha=0.15, lw=0)
        end = ("left", alphas[0]) if best >= 0.5 else ("right", alphas[-1])
        _label(ax, f"within {tolerance:.2g} of best", (end[1], top), (0, 3 * better), end[0], better, BLUE)
    if chosen != best:
        ax.scatter([best], [top], s=90, facecolors="none", edgecolors=ORANGE, linewidths=1.5, zorder=3)
        side = "right" if 0.2 < best < 0.5 or best >= 0.7 else "left"
        _label(ax, f"best: {top:.4g} at {best:g}", (best, top), (0, 8 * better), side, better, ORANGE)
    return figure, ax


def _label(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    side: Any,
    above: int,
    color: str,
    coordinates: Any = "data",
) -> None:
    vertical: Any = "bottom" if above > 0 else "top"
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    ax.annotate(text, at, offset, coordinates, "offset points", ha=side, va=vertical, color=color, bbox=paper)
