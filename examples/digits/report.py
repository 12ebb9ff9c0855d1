"""The table and the figure of demo.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from lightning_tpgm import TPGMCallback
from lightning_tpgm.observing.plotting import axes_for

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


def draw_accuracies(axes: Axes, outcomes: Outcomes) -> None:
    """Draw the accuracy of every method in distribution and on the shifted domains, with standard deviations."""
    for offset, field, colour in ((-0.2, "in_distribution", "0.8"), (0.2, "shifted", "#56B4E9")):
        summary = [mean_and_deviation([100 * getattr(run, field) for run in runs]) for runs in outcomes.values()]
        means, deviations = zip(*summary, strict=True)
        positions = [index + offset for index in range(len(means))]
        bars = axes.bar(positions, means, 0.38, yerr=deviations, capsize=3, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize="small", padding=2)
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "rotation": 90}
        axes.text(offset, 0.02, field.replace("_", " "), **place)
    lowest = min(100 * min(run.in_distribution, run.shifted) for runs in outcomes.values() for run in runs)
    axes.set_title("accuracy, % (the axis does not start at 0)", loc="left", fontsize="medium")
    axes.set_ylim(10 * (lowest // 10), 101)
    axes.set_xticks(range(len(outcomes)), [method.replace(" ", "\n", 1) for method in outcomes])
    axes.grid(visible=False)


def draw_figure(tpgm: TPGMCallback, outcomes: Outcomes, path: Path) -> None:
    """Draw what one run's constraint did beside the accuracies of all runs, and save the figure to `path`."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    tpgm.plot(ax=left)
    draw_accuracies(axes_for(right)[1], outcomes)
    figure.savefig(path, dpi=150)
