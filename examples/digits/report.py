"""The table and the figure of demo.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

FOOTNOTE = (
    "In distribution: 797 test digits of scikit-learn. Fine-tuning used 400 others, the radii 100 held-out ones. "
    "Shifted: mean over 2,000 MNIST test images as is, rotated, noisy, blurred, inverted, of low contrast, shifted. "
    "The pretraining saw images like these, so that column measures what fine-tuning forgets. It does not show how a "
    "model fares on data that is new to it. Mean ± sample standard deviation over the seeds, where there are several."
)


class Outcome(NamedTuple):
    """One run: its accuracies in distribution and on the shifted domains, and the seconds of the fit."""

    in_distribution: float
    shifted: float
    seconds: float


Outcomes = Mapping[str, Sequence[Outcome]]  # by method, one a seed


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0 for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def describe(values: Sequence[float]) -> str:
    """Write the mean, and the sample standard deviation if there are several values, to one decimal place."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"


def results_table(outcomes: Outcomes, title: str) -> Table:
    """Tabulate the outcomes, one row a method."""
    table = Table(title=title)
    table.add_column("method")
    for heading in ("in distribution, %", "shifted, %", "time to fit, s"):
        table.add_column(heading, justify="right")
    for method, runs in outcomes.items():
        table.add_row(
            method,
            describe([100 * run.in_distribution for run in runs]),
            describe([100 * run.shifted for run in runs]),
            describe([run.seconds for run in runs]) if any(run.seconds for run in runs) else "",
        )
    return table


def draw_history(axes: Axes, distances: Mapping[str, Sequence[float]], radii: Mapping[str, Sequence[float]]) -> None:
    """Draw distance and radius (dashed) of every weight but those of batch normalisation, by optimizer step."""
    names = [name for name in radii if name.endswith("0.weight") or name == "head.weight"]
    for name, shade in zip(names, plt.get_cmap("viridis")(range(0, 256, 240 // len(names))), strict=False):
        axes.plot(distances[name], color=shade, linewidth=5, alpha=0.4, label=name)
        axes.plot(radii[name], color=shade, linestyle="--")
    axes.set(title="TPGM (mars)", xlabel="optimizer step", ylabel="largest row sum of |weight - pretrained weight|")
    dashed = Line2D([], [], color="grey", linestyle="--", label="radius")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], dashed], loc="upper center", ncols=3, fontsize="small")


def draw_accuracies(axes: Axes, outcomes: Outcomes) -> None:
    """Draw the accuracy of every method in distribution and on the shifted domains, with standard deviations."""
    for offset, field, colour in ((-0.2, "in_distribution", "tab:grey"), (0.2, "shifted", "tab:orange")):
        summary = [mean_and_deviation([100 * getattr(run, field) for run in runs]) for runs in outcomes.values()]
        means, deviations = zip(*summary, strict=True)
        positions = [index + offset for index in range(len(means))]
        bars = axes.bar(positions, means, 0.38, yerr=deviations, capsize=3, color=colour, label=field.replace("_", " "))
        axes.bar_label(bars, fmt="%.1f", fontsize="small", padding=2)
    lowest = min(100 * min(run.in_distribution, run.shifted) for runs in outcomes.values() for run in runs)
    axes.set(title="Accuracy (the axis does not start at 0)", ylabel="%", ylim=(10 * (lowest // 10), 104.5))
    axes.set_xticks(range(len(outcomes)), list(outcomes))
    axes.legend(loc="upper center", ncols=2, fontsize="small")


def draw_figure(
    distances: Mapping[str, Sequence[float]], radii: Mapping[str, Sequence[float]], outcomes: Outcomes, path: Path
) -> None:
    """Draw one run's distances and radii beside the accuracies of all runs, and save the figure to `path`."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_history(left, distances, radii)
    draw_accuracies(right, outcomes)
    figure.savefig(path, dpi=150)
