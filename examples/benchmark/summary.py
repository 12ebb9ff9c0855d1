"""Tables and figures of the committed results.

python examples/benchmark/summary.py          # write the tables of both READMEs, and the figure
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_tpgm.observing.plotting import name_lines
from losses import COMPARED, NAME
from methods import FIXED_RATES, FTP, METHODS, PLAIN, SHOWN, TPGM, TPGM_SWEEP, WISE_FT
from results import FOLDER, Result, Run, mean_and_error, read, read_rows
from suite import SUITES

OVERVIEW = Path(__file__).parents[2] / "README.md"
DETAILS = Path(__file__).parent / "README.md"
USUAL = "usual"
# A palette that colour-blind readers can tell apart (Okabe and Ito, 2008).
COLOURS = {PLAIN: "#000000", WISE_FT: "#E69F00", TPGM: "#0072B2", TPGM_SWEEP: "#009E73", FTP: "#CC79A7"}


def present(folder: Path = FOLDER) -> list[str]:
    """The suites that have results."""
    return [name for name in SUITES if (folder / f"{name}.csv").exists()]


class SuiteResults:
    """The results of one suite.

    Args:
        name: Of the suite.
        folder: Where the results are.
    """

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self.name = name
        description: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self.rates: list[float] = description["rates"]
        self.conditions: Mapping[str, Mapping[str, Any]] = description["conditions"]
        self.columns = {"in distribution": [description["in_distribution"]], **description["groups"]}
        self.shifted = [domain for domains in description["groups"].values() for domain in domains]
        self._found = {result.run: result for result in read(folder / f"{name}.csv")}
        self._losses = [row for row in read_rows(folder / NAME) if row["suite"] == name]

    def in_distribution(self, method: str, lr: float, measure: str) -> dict[str, float]:
        """A column of losses.csv by seed, of one method at one rate."""
        rows = (row for row in self._losses if (row["method"], float(row["lr"])) == (method, lr))
        return {row["seed"]: float(row[measure]) for row in rows}

    def of(self, method: str, condition: str, lr: float, settings: Mapping[str, Any] | None = None) -> list[Result]:
        """All seeds of one setting, in their order; none if it was not run."""
        key = Run(method, condition, lr, tuple(sorted((settings or {}).items())), 0)
        of_seeds = (self._found.get(replace(key, seed=seed)) for seed in range(100))
        return [result for result in of_seeds if result is not None]

    def pairs(self, method: str, other: str, condition: str, lr: float) -> list[tuple[Result, Result]]:
        """The results of two methods for each seed that both have."""
        others = {result.run.seed: result for result in self.of(other, condition, lr)}
        found = self.of(method, condition, lr)
        return [(result, others[result.run.seed]) for result in found if result.run.seed in others]

    def radius_rates(self, lr: float) -> list[list[Result]]:
        """TPGM with its automatic rate, then with each fixed one, at the seeds that all have; nothing without any."""
        runs = [self.of(TPGM, USUAL, lr, settings) for settings in ({}, *FIXED_RATES)]
        common = set.intersection(*({result.run.seed for result in run} for run in runs))
        return [[result for result in run if result.run.seed in common] for run in runs] if common else []


def cell(pairs: Sequence[tuple[Result, Result]], domains: Sequence[str]) -> str:
    """A mean accuracy in percent, and the paired difference from the other method with its standard error."""
    if not pairs:
        return ""
    mean = fmean(result.mean(domains) for result, _ in pairs)
    if all(result == other for result, other in pairs):
        return f"{mean:.1f}"
    if len(pairs) == 1:
        return f"{mean:.1f} (one run)"
    difference, error = mean_and_error([result.mean(domains) - other.mean(domains) for result, other in pairs])
    return f"{mean:.1f} ({difference:+.1f} ± {error:.1f})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rates_table(suites: Sequence[SuiteResults]) -> str:
    """Every method as it comes, at every learning rate: in distribution and under shift."""
    rows = [
        [
            f"{suite.name}, {lr:g}",
            heading,
            *(cell(suite.pairs(method, PLAIN, USUAL, lr), domains) for method in SHOWN),
        ]
        for suite in suites
        for lr in suite.rates
        for heading, domains in suite.columns.items()
    ]
    return markdown(["suite, learning rate", "tested", *SHOWN], rows)


def conditions_table(suites: Sequence[SuiteResults]) -> str:
    """The same with other schedules, lengths of run and optimizers."""
    rows = [
        [
            f"{suite.name}, {condition}, {lr:g}",
            heading,
            *(cell(suite.pairs(method, PLAIN, condition, lr), domains) for method in SHOWN),
        ]
        for suite in suites
        for condition, details in suite.conditions.items()
        for lr in details["rates"]
        for heading, domains in suite.columns.items()
        if suite.of(PLAIN, condition, lr)
    ]
    return markdown(["suite, condition, learning rate", "tested", *SHOWN], rows)


def options(suite: SuiteResults, method: str) -> list[list[Result]]:
    """What a method was run with, at every learning rate and with every setting of its grid; complete ones only."""
    grid: list[Mapping[str, Any]] = [{}, *next((each.others for each in METHODS if each.name == method), ())]
    found = [suite.of(method, USUAL, lr, settings) for lr in suite.rates for settings in grid]
    most = max(map(len, found), default=0)
    return [results for results in found if results and len(results) == most]


def tuned(suite: SuiteResults, method: str) -> list[Result] | None:
    """A method at the learning rate and setting with the best accuracy on the choice data; None if it was not run."""
    found = options(suite, method)
    return max(found, key=lambda results: fmean(result.choice for result in results)) if found else None


def tuned_table(suites: Sequence[SuiteResults]) -> str:
    """Each method at its own best learning rate and settings, chosen in distribution."""

    def cells(suite: SuiteResults, method: str) -> list[str]:
        best, plain = tuned(suite, method), tuned(suite, PLAIN)
        if best is None or plain is None:
            return ["" for _ in range(len(suite.columns) + 1)]
        settings = ", ".join([f"{best[0].run.lr:g}", *(f"{name} {value}" for name, value in best[0].run.settings)])
        plain_of = {result.run.seed: result for result in plain}
        pairs = [(result, plain_of[result.run.seed]) for result in best if result.run.seed in plain_of]
        return [settings, *(cell(pairs, domains) for domains in suite.columns.values())]

    head = ["", *(f"{suite.name}: {heading}" for suite in suites for heading in ("chosen", *suite.columns))]
    return markdown(head, ([method, *(part for suite in suites for part in cells(suite, method))] for method in SHOWN))


def automatic_table(suites: Sequence[SuiteResults]) -> str:
    """TPGM with its automatic rate and with fixed ones, as mean accuracies over the seeds that all have."""
    rows = []
    for suite in suites:
        for lr in suite.rates:
            if runs := suite.radius_rates(lr):
                for heading, domains in (
                    ("in distribution", suite.columns["in distribution"]),
                    ("shifted", suite.shifted),
                ):
                    means = [f"{fmean(result.mean(domains) for result in run):.1f}" for run in runs]
                    rows.append([f"{suite.name}, {lr:g}", heading, *means])
    return markdown(
        ["suite, learning rate", "tested", "auto", *(f"{rate['radius_lr']:g}" for rate in FIXED_RATES)], rows
    )


def within_one_error(suite: SuiteResults, lr: float, domains: Sequence[str]) -> bool | None:
    """Whether the automatic rate is within a standard error of the best fixed one; None if one was not run."""
    if not (runs := suite.radius_rates(lr)):
        return None
    auto, *fixed = runs
    best = max(fixed, key=lambda run: fmean(result.mean(domains) for result in run))
    differences = [one.mean(domains) - other.mean(domains) for one, other in zip(auto, best, strict=True)]
    difference, error = mean_and_error(differences)
    return difference >= -error


def over_rates(
    suite: SuiteResults, method: str, other: str, domains: Sequence[str], condition: str = USUAL
) -> tuple[float, float]:
    """The difference of two methods, averaged over the learning rates of each seed: its mean and standard error."""
    rates = suite.rates if condition == USUAL else suite.conditions[condition]["rates"]
    by_seed: dict[int, list[float]] = {}
    for lr in rates:
        for result, against in suite.pairs(method, other, condition, lr):
            by_seed.setdefault(result.run.seed, []).append(result.mean(domains) - against.mean(domains))
    complete = [fmean(values) for values in by_seed.values() if len(values) == len(rates)]
    return mean_and_error(complete) if complete else (math.nan, math.nan)


def signed(mean: float, error: float) -> str:
    """A difference with its standard error, if there were several runs; empty if there was none."""
    if math.isnan(mean):
        return ""
    return f"{mean:+.1f} (one run)" if math.isnan(error) else f"{mean:+.1f} ± {error:.1f}"


def averages_table(suites: Sequence[SuiteResults]) -> str:
    """Differences from plain fine-tuning and between the two sweeps, averaged over the learning rates."""
    rows = []
    for suite in suites:
        for condition in (USUAL, *suite.conditions):
            for heading, domains in (("in distribution", suite.columns["in distribution"]), ("shifted", suite.shifted)):
                compared = [(method, PLAIN) for method in SHOWN[1:]] + [(TPGM_SWEEP, WISE_FT)]
                found = [over_rates(suite, *pair, domains, condition) for pair in compared]
                if not all(math.isnan(mean) for mean, _ in found):
                    rows.append([f"{suite.name}, {condition}", heading, *(signed(*each) for each in found)])
    return markdown(["suite, condition", "tested", *SHOWN[1:], "TPGM's sweep less WiSE-FT"], rows)


def draw_rates(suites: Sequence[SuiteResults], path: Path) -> None:
    """Accuracy over the learning rate, in distribution and under shift: the README's picture."""
    figure = Figure(figsize=(8, 0.6 + 2.6 * len(suites)), layout="constrained")
    grid = figure.subplots(len(suites), 2, squeeze=False)
    for row, suite in zip(grid, suites, strict=True):
        shown = {"in distribution": suite.columns["in distribution"], "under shift": suite.shifted}
        for axes, (heading, domains) in zip(row, shown.items(), strict=True):
            ends = draw_curves(axes, suite, domains)
            axes.set_title(f"{suite.name}, {heading}: accuracy in %", loc="left", fontsize="medium")
            axes.set_xlabel("learning rate")
        name_lines(axes, ends, COLOURS)
    figure.savefig(path, dpi=110)


def draw_curves(axes: Axes, suite: SuiteResults, domains: Sequence[str]) -> dict[str, tuple[float, float]]:
    """One line a method, with standard errors. Returns the last point of each."""
    ends = {}
    for method, colour in COLOURS.items():
        runs = [(lr, suite.of(method, USUAL, lr)) for lr in suite.rates]
        points = [(lr, *mean_and_error([result.mean(domains) for result in run])) for lr, run in runs if run]
        if points:
            rates, means, errors = zip(*points, strict=True)
            width = 2.4 if method in (TPGM, TPGM_SWEEP) else 1.4
            axes.errorbar(rates, means, errors, color=colour, marker="o", markersize=3, linewidth=width)
            ends[method] = (rates[-1], means[-1])
    axes.set_xscale("log")
    axes.set_xticks(suite.rates, [f"{lr:g}" for lr in suite.rates])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return ends


def losses_table(suites: Sequence[SuiteResults]) -> str:
    """Cross entropy and accuracy in distribution at small rates, from losses.py; paired differences from plain."""
    rows = []
    for suite in suites:
        for lr in suite.rates:
            for measure, scale, digits in (("loss", 1, 3), ("accuracy", 100, 1)):
                plain, cells = suite.in_distribution(PLAIN, lr, measure), []
                for method in COMPARED:
                    own = suite.in_distribution(method, lr, measure)
                    if own.keys() and own.keys() <= plain.keys():
                        mean, error = mean_and_error([scale * (value - plain[seed]) for seed, value in own.items()])
                        difference = "" if method == PLAIN else f" ({mean:+.{digits}f} ± {error:.{digits}f})"
                        cells.append(f"{fmean(scale * value for value in own.values()):.{digits}f}{difference}")
                if len(cells) == len(COMPARED):
                    rows.append([f"{suite.name}, {lr:g}", measure, *cells])
    return markdown(["suite, learning rate", "on the test data in distribution", *COMPARED], rows)


TABLES: dict[str, Callable[[Sequence[SuiteResults]], str]] = {
    "averages": averages_table,
    "rates": rates_table,
    "conditions": conditions_table,
    "tuned": tuned_table,
    "automatic": automatic_table,
    "losses": losses_table,
}


def overview_table(suites: Sequence[SuiteResults]) -> str:
    """Three methods, averaged over learning rates and seeds: for the README."""

    def mean(suite: SuiteResults, method: str, domains: Sequence[str]) -> str:
        by_rate = [suite.of(method, USUAL, lr) for lr in suite.rates]
        return f"{fmean(fmean(result.mean(domains) for result in run) for run in by_rate):.1f}" if all(by_rate) else ""

    kinds = [
        (suite, heading, domains)
        for suite in suites
        for heading, domains in (("in distribution", suite.columns["in distribution"]), ("shifted", suite.shifted))
    ]
    head = ["accuracy, %", *(f"{suite.name}: {heading}" for suite, heading, _ in kinds)]
    return markdown(
        head, ([m, *(mean(suite, m, domains) for suite, _, domains in kinds)] for m in (PLAIN, WISE_FT, TPGM))
    )


def put(text: str, name: str, table: str) -> str:
    """The text with a table between the marks of this name."""
    begin, end = (f"<!-- table of {name}: {edge} -->\n" for edge in ("begin", "end"))
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


def documents() -> dict[Path, str]:
    """Both READMEs, with the tables of the committed results in them."""
    suites = [SuiteResults(name) for name in present()]
    text = DETAILS.read_text()
    for name, table in TABLES.items():
        text = put(text, name, table(suites))
    return {DETAILS: text, OVERVIEW: put(OVERVIEW.read_text(), "overview", overview_table(suites))}


def main() -> None:
    """Write the tables and the figure, or print what another folder holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args()
    suites = [SuiteResults(name, arguments.results) for name in present(arguments.results)]
    draw_rates(suites, arguments.results / "rates.png")
    if arguments.results == FOLDER:
        for path, text in documents().items():
            path.write_text(text)
    else:
        for name, table in TABLES.items():
            print(name, table(suites), sep="\n\n")


if __name__ == "__main__":
    main()
