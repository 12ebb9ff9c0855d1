"""Figures, with matplotlib, which is installed by the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of Okabe and Ito's palette, which people with any colour vision can tell apart
BLUE, ORANGE = "#0072B2", "#D55E00"
DECADES = 1e4
"""A logarithmic scale reaches this far below the largest value: radii at their floor of 1e-8 would take all of it."""
SHOWN_NAMES = 40
"""More names than these cannot be read in one figure: then only every n-th tensor has its name written."""


def axes_for(ax: Axes | None, width: float = 6.4, height: float = 4.8) -> tuple[Figure, Axes]:
    """The axes to draw into and their figure, a new one if none are given.

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
    if ax is None:
        return plt.subplots(figsize=(width, height), layout="constrained")
    return ax.figure, ax  # type: ignore[return-value]  # a part of a figure will do


def plot_layers(
    names: Sequence[str], quantities: Mapping[str, Tensor], title: str, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Radius and distance of each tensor, one row a tensor, the first at the top.

    Args:
        names: Of T tensors.
        quantities: ``distance``, and ``radius``, ``binds`` or ``omega`` if the method has them, shape (T,) each.
        title: Of the figure.
        ax: Where to draw; None: a new figure.
    """
    figure, ax = axes_for(ax, width=7.5, height=_height(len(names)))
    rows = range(len(names))
    distance = quantities["distance"].tolist()
    values = list(distance)
    size = 30 if len(names) <= SHOWN_NAMES else 14
    ax.hlines(rows, 0, distance, color="0.85", linewidth=1, zorder=1)
    if "radius" in quantities:
        radius, binds = quantities["radius"].tolist(), quantities["binds"].tolist()
        values += radius
        ax.scatter(radius, rows, s=4 * size, marker="|", color="0.4", label="radius", zorder=2)
        for label, bound, color in (("distance, constraint binds", True, ORANGE), ("distance, inside", False, BLUE)):
            chosen = [row for row in rows if binds[row] is bound]
            ax.scatter([distance[row] for row in chosen], chosen, s=size, color=color, label=label, zorder=3)
    else:
        ax.scatter(distance, rows, s=size, color=BLUE, label="distance", zorder=3)
    ax.set(title=title, xlabel="distance from the pretrained value")
    _scale(ax, values)
    if "omega" in quantities:
        ax.scatter(quantities["omega"].tolist(), rows, s=size, marker="D", color=ORANGE, label="omega", zorder=2)
        ax.set_xlabel("distance from the pretrained value; omega")
    if len(ax.collections) > 2:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6 / _height(len(names))), ncols=3, frameon=False)
    _name_rows(ax, names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    return figure, ax


def plot_steps(
    names: Sequence[str], steps: Sequence[int], values: Tensor, title: str, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """A heat map of one quantity: one row a tensor, the first at the top, by optimizer steps.

    Args:
        names: Of T tensors.
        steps: The R steps that were recorded, increasing.
        values: Shape (R, T); what is not a number stays blank.
        title: Of the figure.
        ax: Where to draw; None: a new figure.
    """
    figure, ax = axes_for(ax, width=7.5, height=_height(len(names)))
    from matplotlib.colors import LogNorm, Normalize

    finite = values[values.isfinite() & (values > 0)]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
    log = high > 20 * low > 0
    norm = LogNorm(max(low, high / DECADES), high) if log else Normalize(0, high)
    edges = [(a + b) / 2 for a, b in pairwise(steps)]
    edges = [steps[0] - 0.5, *edges, steps[-1] + 0.5]
    bounds = [row - 0.5 for row in range(len(names) + 1)]
    values = values.clamp(min=low / 2) if log else values  # a logarithm of 0 would be blank
    mesh = ax.pcolormesh(edges, bounds, values.T.numpy(), norm=norm, cmap="cividis")
    figure.colorbar(mesh, ax=ax, extend="min" if log and low < high / DECADES else "neither")
    ax.set(title=title, xlabel="optimizer step")
    _name_rows(ax, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    return figure, ax


def _height(rows: int) -> float:
    return 1.6 + 0.2 * min(max(rows, 8), SHOWN_NAMES)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // SHOWN_NAMES)
    shown = range(0, len(names), every)
    ax.set_yticks(list(shown), [_short(names[row]) for row in shown], fontsize="x-small")


def _short(name: str, length: int = 36) -> str:
    """The end of a long name says most.

    >>> _short("model.text_model.encoder.layers.11.self_attn.k_proj.weight")
    '…oder.layers.11.self_attn.k_proj.weight'
    """
    return name if len(name) <= length + 2 else f"…{name[-length - 2 :]}"


def _scale(ax: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 20 * min(positive):
        ax.set_xscale("symlog", linthresh=max(min(positive), max(positive) / DECADES))
    ax.set_xlim(left=0)
