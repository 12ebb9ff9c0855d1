"""Tables and figures of the committed results.

python examples/benchmark/summary.py          # write the tables of both READMEs, and the figure
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import targets
from leads import FROM_SWEEP, IDEAS, IN_TURN, LATER, MIXES, ONE_BY_ONE, ROTATING
from lightning_tpgm.observing.plotting import name_lines
from losses import COMPARED
from methods import AFTER, CADENCES, EMA, FIXED_RATES, FTP, L2_SP, METHODS, PLAIN, SHOWN, TPGM, TPGM_SWEEP, WISE_FT
from results import FOLDER, Result, mean_and_error
from suite import COSINE, FEW, USUAL
from suite_results import SuiteResults, at_common_seeds, differences, paired, present

OVERVIEW = Path(__file__).parents[2] / "README.md"
DETAILS = Path(__file__).parent / "README.md"
# A palette that colour-blind readers can tell apart (Okabe and Ito, 2008).
COLOURS = {
    PLAIN: "#000000",
    EMA: "#56B4E9",
    L2_SP: "#D55E00",
    AFTER: "#999999",
    WISE_FT: "#E69F00",
    FTP: "#CC79A7",
    TPGM: "#0072B2",
    TPGM_SWEEP: "#009E73",
}


def cell(pairs: Sequence[tuple[Result, Result]], domains: Sequence[str]) -> str:
    """A mean accuracy in percent, and the paired difference from the other method with its standard error."""
    if not pairs:
        return ""
    mean = fmean(result.mean(domains) for result, _ in pairs)
    if all(result == other for result, other in pairs):
        return f"{mean:.1f}"
    if len(pairs) == 1:
        return f"{mean:.1f} (one run)"
    difference, error = mean_and_error(differences(pairs, domains))
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


def grid(method: str) -> list[Mapping[str, Any]]:
    """The settings to compare of a method: as it comes, and the others of its fit."""
    fit = TPGM if method == TPGM_SWEEP else method
    return [{}, *next((each.others for each in METHODS if each.name == fit), ())]


def options(suite: SuiteResults, method: str) -> list[list[Result]]:
    """What a method was run with: each setting of its grid at each rate, at the seeds that all of them have."""
    found = [suite.of(method, USUAL, lr, settings) for settings in grid(method) for lr in suite.rates]
    return at_common_seeds([run for run in found if run])


def tuned(suite: SuiteResults, method: str) -> list[Result]:
    """All seeds of a method at the learning rate and setting that are best on the choice data of the common seeds."""
    found = options(suite, method)
    if not found:
        return []
    best = max(found, key=lambda results: fmean(result.choice for result in results))[0].run
    return suite.of(method, USUAL, best.lr, dict(best.settings))


def tuned_table(suites: Sequence[SuiteResults]) -> str:
    """Each method at its own best learning rate and settings, chosen in distribution."""

    def cells(suite: SuiteResults, method: str) -> list[str]:
        best, plain = tuned(suite, method), tuned(suite, PLAIN)
        if not best or not plain:
            return ["" for _ in range(len(suite.columns) + 1)]
        settings = ", ".join([f"{best[0].run.lr:g}", *(f"{name} {value}" for name, value in best[0].run.settings)])
        return [settings, *(cell(paired(best, plain), domains) for domains in suite.columns.values())]

    head = ["", *(f"{suite.name}: {heading}" for suite in suites for heading in ("chosen", *suite.columns))]
    return markdown(head, ([method, *(part for suite in suites for part in cells(suite, method))] for method in SHOWN))


def compared_settings_table(suites: Sequence[SuiteResults]) -> str:
    """From how many settings and on how many seeds the rows of the tuned table were chosen."""

    def text(suite: SuiteResults, method: str) -> str:
        found = options(suite, method)
        if not found:
            return ""
        settings, seeds = {run[0].run.settings for run in found}, len(found[0])
        return f"{len(settings)} of {len(grid(method))}, {seeds} seed{'s' if seeds > 1 else ''}"

    rows = ([method, *(text(suite, method) for suite in suites)] for method in SHOWN)
    return markdown(["settings compared", *(suite.name for suite in suites)], rows)


def automatic_table(suites: Sequence[SuiteResults]) -> str:
    """TPGM with its automatic rate and with fixed ones, as mean accuracies over the seeds that all have."""
    rows = []
    for suite in suites:
        for lr in suite.rates:
            if runs := suite.radius_rates(lr):
                for heading, domains in suite.both:
                    means = [f"{fmean(result.mean(domains) for result in run):.1f}" for run in runs]
                    rows.append([f"{suite.name}, {lr:g}", heading, *means])
    return markdown(
        ["suite, learning rate", "tested", "auto", *(f"{rate['radius_lr']:g}" for rate in FIXED_RATES)], rows
    )


def signed(mean: float, error: float) -> str:
    """A difference with its standard error, if there were several runs; empty if there was none."""
    if math.isnan(mean):
        return ""
    return f"{mean:+.1f} (one run)" if math.isnan(error) else f"{mean:+.1f} ± {error:.1f}"


def averages_table(suites: Sequence[SuiteResults]) -> str:
    """Differences from plain fine-tuning, averaged over the learning rates."""
    return compared_table(suites, {method: (method, PLAIN) for method in SHOWN[1:]})


def sweeps_table(suites: Sequence[SuiteResults]) -> str:
    """The same of the sweeps, with the rule and at the best held-out accuracy, and the difference of the two sweeps."""
    best, best_wise_ft = f"{TPGM_SWEEP}, best alpha", f"{WISE_FT}, best alpha"
    less = {
        "TPGM's sweep less WiSE-FT": (TPGM_SWEEP, WISE_FT),
        "the same, best alphas": (best, best_wise_ft),
        best_wise_ft: (best_wise_ft, PLAIN),
        best: (best, PLAIN),
    }
    return compared_table(suites, less)


def compared_table(suites: Sequence[SuiteResults], compared: Mapping[str, tuple[str, str]]) -> str:
    """Differences between two methods each, averaged over the learning rates."""
    rows = []
    for suite in suites:
        for condition in (USUAL, *suite.conditions):
            for heading, domains in suite.both:
                found = [suite.over_rates(*pair, domains, condition) for pair in compared.values()]
                if not all(math.isnan(mean) for mean, _ in found):
                    rows.append([f"{suite.name}, {condition}", heading, *(signed(*each) for each in found)])
    return markdown(["suite, condition", "tested", *compared], rows)


def settings_table(
    suites: Sequence[SuiteResults], conditions: Sequence[str], compared: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> str:
    """Methods with settings of their own, and the paired difference from the same ones as they come."""
    rows = []
    for suite in suites:
        for condition in conditions:
            for lr in suite.rates:
                if not any(own and suite.of(method, condition, lr, own) for method, own in compared.values()):
                    continue
                runs = [
                    paired(suite.of(method, condition, lr, own), suite.of(method, condition, lr))
                    for method, own in compared.values()
                ]
                for heading, domains in suite.both:
                    cells = (cell(run, domains) for run in runs)
                    rows.append([f"{suite.name}, {condition}, {lr:g}", heading, *cells])
    return markdown(["suite, condition, learning rate", "tested", *compared], rows)


def cadence_table(suites: Sequence[SuiteResults]) -> str:
    """TPGM that updates its radii more or less often."""
    others = {f"every {settings['every_n_steps']}": (TPGM, settings) for settings in CADENCES}
    return settings_table(suites, [USUAL], {"every 4 (the default)": (TPGM, {}), **others})


def norm_table(suites: Sequence[SuiteResults]) -> str:
    """TPGM with the other norm."""
    l2 = {"norm": "l2"}
    swept = {"mars, then the sweep": (TPGM_SWEEP, {}), "l2, then the sweep": (TPGM_SWEEP, l2)}
    return settings_table(suites, [USUAL], {"mars (the default)": (TPGM, {}), "l2": (TPGM, l2), **swept})


def leads_table(suites: Sequence[SuiteResults]) -> str:
    """Ideas that are not in the package, each beside the method that it would change."""
    after = {"TPGM after the fact": (AFTER, {}), FROM_SWEEP: (AFTER, {"lead": FROM_SWEEP})}
    ideas = {lead: (TPGM, {"lead": lead}) for lead in IDEAS}
    return settings_table(suites, [USUAL, COSINE], {"TPGM": (TPGM, {}), **ideas, **after})


def leads_sweeps_table(suites: Sequence[SuiteResults]) -> str:
    """The same, after the sweep."""
    ideas = {lead: (TPGM_SWEEP, {"lead": lead}) for lead in IDEAS}
    return settings_table(suites, [USUAL, COSINE], {TPGM_SWEEP: (TPGM_SWEEP, {}), **ideas})


def later_leads_table(suites: Sequence[SuiteResults]) -> str:
    """More ideas that are not in the package."""
    ideas = {lead: (TPGM, {"lead": lead}) for lead in (*LATER, ROTATING)}
    after = {lead: (AFTER, {"lead": lead}) for lead in (FROM_SWEEP, ONE_BY_ONE)}
    compared = {"TPGM": (TPGM, {}), **ideas, "TPGM after the fact": (AFTER, {}), **after}
    return settings_table(suites, [USUAL, COSINE], compared)


def mixes_table(suites: Sequence[SuiteResults]) -> str:
    """Radii that are learned from training data, too."""
    data = {lead: (TPGM, {"lead": lead}) for lead in (IN_TURN, *MIXES)}
    return settings_table(suites, [USUAL, COSINE, *FEW], {"TPGM": (TPGM, {}), **data})


def targets_table(suites: Sequence[SuiteResults]) -> str:
    """What was to be shown, and what was found."""
    rows = ([*texts, "yes" if met else "no"] for *texts, met in targets.rows(suites))
    return markdown(["target, in points of accuracy", "where", "found", "met"], rows)


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
    """One line a method, with standard errors, where half of plain fine-tuning's seeds were run. Returns the ends."""
    ends = {}
    for method, colour in COLOURS.items():
        runs = [(lr, suite.of(method, USUAL, lr), suite.of(PLAIN, USUAL, lr)) for lr in suite.rates]
        enough = [(lr, run) for lr, run, plain in runs if run and 2 * len(run) >= len(plain)]
        points = [(lr, *mean_and_error([result.mean(domains) for result in run])) for lr, run in enough]
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
    "targets": targets_table,
    "averages": averages_table,
    "sweeps": sweeps_table,
    "rates": rates_table,
    "conditions": conditions_table,
    "tuned": tuned_table,
    "compared settings": compared_settings_table,
    "automatic": automatic_table,
    "losses": losses_table,
    "cadence": cadence_table,
    "norm": norm_table,
    "leads": leads_table,
    "leads, swept": leads_sweeps_table,
    "more leads": later_leads_table,
    "training data": mixes_table,
}


def overview_table(suites: Sequence[SuiteResults]) -> str:
    """Five methods, averaged over learning rates and seeds, and in brackets tuned: for the README."""
    methods = (PLAIN, WISE_FT, FTP, TPGM, TPGM_SWEEP)
    kinds = [(suite, heading, domains) for suite in suites for heading, domains in suite.both]

    def mean(runs: Sequence[Sequence[Result]], domains: Sequence[str]) -> str:
        return f"{fmean(fmean(result.mean(domains) for result in run) for run in runs):.1f}" if all(runs) else ""

    columns = []
    for suite, _, domains in kinds:
        best = at_common_seeds([tuned(suite, method) for method in methods]) or [[] for _ in methods]
        over_rates = [mean([suite.of(method, USUAL, lr) for lr in suite.rates], domains) for method in methods]
        both = zip(over_rates, best, strict=True)
        columns.append([f"{each} ({mean([run], domains)})" if run else each for each, run in both])
    head = ["accuracy, % (at its best rate and setting)", *(f"{suite.name}: {heading}" for suite, heading, _ in kinds)]
    return markdown(head, zip(methods, *columns, strict=True))


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
