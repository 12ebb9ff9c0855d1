"""Figures, with matplotlib, which is installed by the extra ``plots``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_tpgm.observing.names import end_of, shortened
from lightning_tpgm.observing.reporting import PINNED, by_block, left
from lightning_tpgm.projection import MIN_RADIUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of Okabe and Ito's palette, which people with any colour vision can tell apart
BLUE, ORANGE = "#0072B2", "#D55E00"
GREY = "0.35"
DECADES = 1e4
"""A logarithmic scale reaches this far below the largest value: radii at their floor of 1e-8 would take all of it."""
ROWS = 40
"""More tensors than these cannot be read in one figure: then they are shown by block."""
RATIOS = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0)
"""The steps of the colours of ratios: a step adds little to the distance of a long run, so most are close to 1."""


_EXPLAINED = {
    "distance": "distance from the pretrained value",
    "ratio": "left by each projection (1: not bound)",
    "bound": "bound, share of the steps so far",
}


def axes_for(ax: Axes | None, width: float = 6.4, height: float = 4.8) -> tuple[Figure, Axes]:
    """The axes to draw into and their figure, a new one if none are given, in the style of all figures.

    Args:
        ax: The user's axes, or None.
        width: Of a new figure, in inches.
        height: Of a new figure, in inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib: pip install 'lightning-tpgm[plots]'.") from error
    figure = None
    if ax is None:
        figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
    _style(ax)
    return figure or ax.figure, ax  # type: ignore[return-value]  # a part of a figure will do


def plot_layers(
    names: Sequence[str], quantities: Mapping[str, Tensor], title: str, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """What was wanted and what was allowed, one row a tensor or block, the first at the top; shares at the right.

    Args:
        names: Of T tensors.
        quantities: See `lightning_tpgm.observing.reporting`, shape (T,) each.
        title: Of the figure.
        ax: Where to draw. None: a new figure.
    """
    sizes, shown = by_block(names, quantities, ROWS)
    figure, ax = axes_for(ax, width=7.5, height=_height(len(sizes)))
    rows = list(range(len(sizes)))
    colors = [BLUE] * len(rows)
    if "pinned" in shown:
        colors = [ORANGE if share >= PINNED else BLUE for share in shown["pinned"].tolist()]
    lengths = ("allowed", "wanted") if "wanted" in shown else ("distance",)
    ends = [shown[name].nan_to_num(nan=0).tolist() for name in lengths]
    low = _scale(ax, [value for values in ends for value in values])
    moved = [end > MIN_RADIUS for end in ends[-1]]  # the others have no place on a logarithmic scale
    less = [value < low for value in ends[0]]  # than the scale shows
    ends = [[max(v, low) if here else math.nan for v, here in zip(values, moved, strict=True)] for values in ends]
    if not any(moved):
        ax.text(0.5, 0.5, "no constrained tensor has moved", transform=ax.transAxes, ha="center", color=GREY)
    elif len(ends) == 2:
        allowed, wanted = ends
        ax.hlines(rows, allowed, wanted, color=colors, linewidth=2, alpha=0.35, zorder=1)
        seen = [math.nan if is_less else end for end, is_less in zip(allowed, less, strict=True)]
        hidden = [end if is_less else math.nan for end, is_less in zip(allowed, less, strict=True)]
        ax.scatter(seen, rows, s=60, marker="|", color=colors, label="allowed", zorder=2)
        ax.scatter(hidden, rows, s=30, marker="$<$", color=colors, label="allowed less than the scale shows", zorder=2)
        ax.scatter(wanted, rows, s=18, color=colors, label="wanted", zorder=3)
        _name_ends(ax, allowed, wanted, ("allowed", "wanted") if "bound" in shown else ("after", "before"))
    else:
        ax.scatter(ends[0], rows, s=18, color=BLUE, label="distance", zorder=3)
    shares = {"kept, %": left(shown)} if "wanted" in shown else {}
    shares |= {f"{name}, %": shown[name] for name in ("bound", "omega") if name in shown}
    _bars(ax, shares, colors, shown.get("pinned"))
    ax.set_title(title, loc="left", fontsize="medium")
    ax.set_xlabel("distance from the pretrained value" + (", mean over the steps" if "bound" in shown else ""))
    _name_rows(ax, list(sizes))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    return figure, ax


def _name_ends(ax: Axes, left_end: Sequence[float], right_end: Sequence[float], words: tuple[str, str]) -> None:
    """Write what the ends of the lines are beside those of the longest one."""
    to_axes = ax.transScale + ax.transLimits
    ends = [[float(to_axes.transform((value, 0))[0]) for value in values] for values in (left_end, right_end)]
    lengths = [b - a for a, b in zip(*ends, strict=True)]
    row = max(range(len(lengths)), key=lambda index: lengths[index] if lengths[index] >= 0 else -1)
    inside = lengths[row] > 0.3
    for values, word, side in ((left_end, words[0], -1), (right_end, words[1], 1)):
        leans = "left" if (side < 0) == inside else "right"
        offset = (2, 1) if inside else (5 * side, 0)
        ax.annotate(
            word,
            (values[row], row),
            (offset[0] if leans == "left" else -abs(offset[0]), offset[1]),
            textcoords="offset points",
            ha=leans,
            va="bottom" if inside else "center",
            fontsize="x-small",
            color=GREY,
        )


def _bars(ax: Axes, shares: Mapping[str, Tensor], colors: Sequence[str], pinned: Tensor | None) -> None:
    """Shares as bars at the right of the axes, a column each, every bar with its number."""
    from mpl_toolkits.axes_grid1 import make_axes_locatable  # type: ignore[import-untyped]

    divider = make_axes_locatable(ax)
    for title, values in shares.items():
        right = divider.append_axes("right", size="20%", pad=0.15, sharey=ax)
        _style(right)
        rows, percent = range(len(values)), (100 * values.nan_to_num(nan=0)).tolist()
        right.barh(rows, percent, height=0.6, color=colors, alpha=0.5)
        for row, share in enumerate(percent):
            is_pinned = title.startswith("bound") and pinned is not None and float(pinned[row]) >= PINNED
            right.text(2, row, f"{share:.0f}{' pinned' if is_pinned else ''}", va="center", fontsize="x-small")
        right.set(xlim=(0, 108))
        right.set_title(title, loc="left", fontsize="small")
        right.tick_params(labelleft=False, labelbottom=False, left=False, bottom=False)


def plot_steps(
    names: Sequence[str], steps: Sequence[int], values: Tensor, title: str, quantity: str, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """A heat map of one quantity: one row a tensor or block, the first at the top, by optimizer steps.

    Args:
        names: Of T tensors.
        steps: The R steps that were recorded, increasing.
        values: Shape (R, T); what is not a number stays blank.
        title: Of the figure.
        quantity: What the values are.
        ax: Where to draw. None: a new figure.
    """
    by_step = [by_block(names, {quantity: row}, ROWS) for row in values]
    sizes = by_step[0][0]
    values = torch.stack([shown[quantity] for _, shown in by_step])
    figure, ax = axes_for(ax, width=7.5, height=_height(len(sizes)))
    from matplotlib.colors import BoundaryNorm, LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    edges = [(a + b) / 2 for a, b in pairwise(steps)]
    edges = [steps[0] - 0.5, *edges, steps[-1] + 0.5]
    bounds = [row - 0.5 for row in range(len(sizes) + 1)]
    finite = values[values.isfinite() & (values > 0)]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
    log = quantity in ("distance", "radius") and high > 20 * low > 0
    extend = "min" if log and low < high / DECADES else "neither"
    norm: Normalize
    if quantity == "ratio":
        norm, extend = BoundaryNorm(RATIOS, 256, extend="max"), "max"
    elif log:
        norm = LogNorm(max(low, high / DECADES), high)
        values = values.clamp(min=low / 2)  # a logarithm of 0 would be blank
    else:
        norm = Normalize(0, high if quantity in ("distance", "radius") else 1)
    mesh = ax.pcolormesh(edges, bounds, values.T.numpy(), norm=norm, cmap="cividis")
    bar = figure.colorbar(mesh, ax=ax, extend=extend, format="%g")
    bar.ax.tick_params(labelsize="small", color=GREY)
    bar.set_label(_EXPLAINED.get(quantity, quantity), fontsize="small")
    ax.set_title(title, loc="left", fontsize="medium")
    ax.set(xlabel="optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(visible=False)
    _name_rows(ax, list(sizes))
    ax.set_ylim(len(sizes) - 0.5, -0.5)
    return figure, ax


def name_lines(ax: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str], size: float = 8) -> None:
    """Write the names of lines at the right of their last points, one above the other where these are close.

    Args:
        ax: With its lines drawn, and its scales set.
        ends: The last point of each line, by name.
        colors: Of the lines, by name.
        size: Of the letters, in points.
    """
    ax.get_ylim()  # settles the limits, which what is drawn has changed
    to_axes = ax.transScale + ax.transLimits
    heights = {name: float(to_axes.transform(end)[1]) for name, end in ends.items()}
    names = sorted(heights, key=heights.__getitem__)
    gap = 1.2 * size / (ax.get_window_extent().height * 72 / ax.figure.dpi)
    for below, name in pairwise(names):
        heights[name] = max(heights[name], heights[below] + gap)
    top = 1.0
    for name in reversed(names):
        heights[name] = min(heights[name], top)
        top = heights[name] - gap
        place = (1.02, heights[name])
        ax.annotate(name, place, xycoords="axes fraction", va="center", fontsize=size, color=colors[name])


def _style(ax: Axes) -> None:
    """Of all figures: few lines, so that the data are seen."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="0.92")
    ax.set_axisbelow(True)
    ax.tick_params(labelsize="small", color=GREY)


def _height(rows: int) -> float:
    return 1.6 + 0.2 * min(max(rows, 8), ROWS)


def _name_rows(ax: Axes, labels: Sequence[str]) -> None:
    every = -(-len(labels) // ROWS)
    short = [end_of(label) for label in shortened(labels)]
    ax.set_yticks(list(range(0, len(labels), every)), short[::every], fontsize="x-small")


def _scale(ax: Axes, values: Sequence[float]) -> float:
    """A scale on which the values can be told apart, and its least value."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) < 20 * min(positive):
        ax.set_xlim(0, 1.2 * max(values, default=0) or 1)
        return 0.0
    low = max(min(positive), max(positive) / DECADES)
    margin = (max(positive) / low) ** 0.12
    ax.set_xscale("log")
    ax.set_xlim(low / margin**1.8, max(positive) * margin)  # room for a word at the left
    return low
