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

GREEN = "#009E73"  # of the same palette
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
    rows = range(len(outcomes))
    for field, colour in (("in_distribution", "black"), ("shifted", GREEN)):
        summary = [mean_and_deviation([100 * getattr(run, field) for run in runs]) for runs in outcomes.values()]
        means, deviations = zip(*summary, strict=True)
        axes.errorbar(means, rows, xerr=deviations, fmt="o", capsize=3, color=colour)
        words = [f"{mean:.1f}" for mean in means]
        words[0] = f"{field.replace('_', ' ')}\n{words[0]}"
        for mean, row, word in zip(means, rows, words, strict=True):
            place = {"textcoords": "offset points", "ha": "center", "fontsize": "small", "color": colour}
            axes.annotate(word, (mean, row), (0, 6), **place)
    axes.set_title("accuracy, %", loc="left", fontsize="medium")
    axes.set_yticks(rows, list(outcomes))
    axes.set_ylim(len(outcomes) - 0.6, -0.8)
    axes.margins(x=0.2)


def draw_figure(tpgm: TPGMCallback, outcomes: Outcomes, path: Path) -> None:
    """Draw what one run's constraint did beside the accuracies of all runs, and save the figure to `path`."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    tpgm.plot(ax=left)
    draw_accuracies(axes_for(right)[1], outcomes)
    figure.savefig(path, dpi=150)
