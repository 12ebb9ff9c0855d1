"""Tables and figures of the committed results.

python examples/benchmark/summary.py          # write the READMEs' tables and the figures
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leads import LEADS
from methods import ALPHAS, ELSEWHERE, FIXED, LINEAR_PROBE, METHODS, PLAIN, WISE_FT, Fixed, Method
from results import FOLDER, Result, Settings, mean_and_error, of, read
from suite import SUITES

OVERVIEW = Path(__file__).parents[2] / "README.md"
SMALL_RATE = Fixed("plain fine-tuning, lr 1e-4", PLAIN.name, {"lr": 1e-4})  # where it was tried
DETAILS = Path(__file__).parent / "README.md"


def present(folder: Path = FOLDER) -> list[str]:
    """The suites that have results."""
    return [name for name in SUITES if (folder / f"{name}.json").exists()]


class SuiteResults:
    """The committed results of one suite.

    Args:
        name: Of the suite.
        folder: Where the results are.
    """

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self.name = name
        self.results = read(folder / f"{name}.csv")
        self.description: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self.chosen: Mapping[str, Settings] = self.description["chosen"]
        self.seeds: list[int] = self.description["seeds"]
        self.in_distribution: str = self.description["in_distribution"]
        self.groups: Mapping[str, list[str]] = self.description["groups"]
        self.plain = self.of(PLAIN.name)
        self.elsewhere: Mapping[str, Settings] = self.description.get("elsewhere", {})

    @property
    def columns(self) -> dict[str, list[str]]:
        """What a table shows: its heading, and the domains that it is the mean of."""
        return {"in distribution": [self.in_distribution], **self.groups}

    @property
    def shifted(self) -> list[str]:
        """All domains but the one in distribution."""
        return [domain for domains in self.groups.values() for domain in domains]

    def of(self, method: str, settings: Settings | None = None) -> list[Result]:
        """The results of a method or a fixed setting, in the order of the seeds; None: with its chosen settings."""
        for fixed in (*FIXED, SMALL_RATE):
            if fixed.name == method:
                method, settings = fixed.method, {**self.chosen[PLAIN.name], **fixed.settings}
        return of(self.results, method, self.chosen[method] if settings is None else settings, self.seeds)

    def own_settings(self, method: str) -> str:
        """The chosen settings that are the method's own."""
        shared = ("norm",) if method == LINEAR_PROBE.name else ("norm", "lr", "probe_lr")
        own = {name: value for name, value in self.chosen[method].items() if name not in shared}
        return ", ".join(f"{name} {value:g}" for name, value in own.items())

    def accuracy(self, method: str, domains: Sequence[str]) -> tuple[float, float]:
        """Mean accuracy over domains and seeds, in percent, and its standard error."""
        return mean_and_error([100 * result.mean(domains) for result in self.of(method)])

    def gain(self, method: str, domains: Sequence[str]) -> tuple[float, float]:
        """Paired difference from plain fine-tuning, in percentage points, and its standard error."""
        return gain(self.of(method), self.plain, domains)

    def cell(self, method: str, domains: Sequence[str]) -> str:
        """An accuracy, and the gain over plain fine-tuning; empty for a method that was not tried."""
        try:
            return cell(self.of(method), self.plain, domains)
        except LookupError:
            return ""

    def cell_at(self, condition: str, method: Method, domains: Sequence[str]) -> str:
        """The same under one of the other conditions, at the method's fixed setting."""
        try:
            found, plain = (self.of(each.name, self.settings_at(condition, each)) for each in (method, PLAIN))
        except LookupError:
            return ""
        return cell(found, plain, domains)

    def settings_at(self, condition: str, method: Method) -> Settings:
        """All settings of a method under one of the other conditions."""
        (own,) = method.grid
        return {**self.chosen[PLAIN.name], **self.elsewhere[condition], **own}


def gain(found: Sequence[Result], plain: Sequence[Result], domains: Sequence[str]) -> tuple[float, float]:
    """Paired difference of the mean over domains, in percentage points, and its standard error."""
    pairs = zip(found, plain, strict=True)
    return mean_and_error([100 * (result.mean(domains) - other.mean(domains)) for result, other in pairs])


def cell(found: Sequence[Result], plain: Sequence[Result], domains: Sequence[str]) -> str:
    """An accuracy in percent, and its gain over plain fine-tuning unless it is that."""
    accuracy = 100 * fmean(result.mean(domains) for result in found)
    if found == plain:
        return f"{accuracy:.1f}"
    difference, error = gain(found, plain, domains)
    return f"{accuracy:.1f} ({difference:+.1f} ± {error:.1f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table's rows, the heading and the line under it included."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def table(suites: Sequence[SuiteResults], methods: Sequence[Method | Fixed] = (*METHODS, *FIXED, SMALL_RATE)) -> str:
    """Methods on suites, in Markdown."""
    columns = [(suite, heading, domains) for suite in suites for heading, domains in suite.columns.items()]
    rows = [
        ["", *(f"{suite.name}: {heading}" for suite, heading, _ in columns)],
        ["---", *("---:" for _ in columns)],
        *([method.name, *(suite.cell(method.name, domains) for suite, _, domains in columns)] for method in methods),
    ]
    return markdown(rows)


def elsewhere_table(suites: Sequence[SuiteResults]) -> str:
    """Methods at fixed settings under other conditions, in Markdown."""
    rows = [
        ["", *(method.name for method in ELSEWHERE)],
        ["---", *("---:" for _ in ELSEWHERE)],
        *(
            [f"{suite.name}, {condition}: {heading}", *(suite.cell_at(condition, m, domains) for m in ELSEWHERE)]
            for suite in suites
            for condition in suite.elsewhere
            for heading, domains in suite.columns.items()
        ),
    ]
    return markdown(rows)


def settings_table(suites: Sequence[SuiteResults]) -> str:
    """What was chosen, in Markdown."""
    rows = [
        ["", *(suite.name for suite in suites)],
        ["---", *("---" for _ in suites)],
        ["learning rate", *(f"{suite.chosen[PLAIN.name]['lr']:g}" for suite in suites)],
        *(
            [method.name, *(suite.own_settings(method.name) for suite in suites)]
            for method in METHODS
            if len(method.grid) > 1
        ),
    ]
    return markdown(rows)


def draw_trade_off(axes: Axes, suite: SuiteResults) -> None:
    """Accuracy in distribution against accuracy under shift, one point a method, with the curve of WiSE-FT."""
    rates = {name: value for name, value in suite.chosen[WISE_FT.name].items() if name != "alpha"}
    curve = [suite.of(WISE_FT.name, {**rates, "alpha": alpha}) for alpha in ALPHAS]
    across = [100 * fmean(result.mean([suite.in_distribution]) for result in results) for results in curve]
    up = [100 * fmean(result.mean(suite.shifted) for result in results) for results in curve]
    axes.plot(across, up, color="grey", marker=".", linewidth=1, label="WiSE-FT, every alpha")
    markers = "osD^v<>pPX*hd8"
    for index, name in enumerate(method.name for method in METHODS):
        x, x_error = suite.accuracy(name, [suite.in_distribution])
        y, y_error = suite.accuracy(name, suite.shifted)
        marker, colour = markers[index % len(markers)], f"C{index % 10}"
        axes.errorbar(x, y, y_error, x_error, marker, color=colour, markersize=6, linewidth=0.7, label=name)
    axes.set(title=suite.name, xlabel="in distribution, %", ylabel="mean over shifted domains, %")


def draw_radii(axes: Axes, suite: SuiteResults, method: str, folder: Path) -> None:
    """The radius and the distance of each constrained tensor, in the order of the network."""
    settings = json.dumps(suite.chosen[method], sort_keys=True)
    with (folder / f"{suite.name}_radii.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["method"], row["settings"]) == (method, settings)]
    axes.semilogy([float(row["radius"]) for row in rows], ".", color="C1", label="radius")
    axes.semilogy([float(row["distance"]) for row in rows], "_", color="C0", label="distance")
    axes.set(title=f"{suite.name}: {method}", xlabel="constrained tensor, from input to output")


def draw(suites: Sequence[SuiteResults], folder: Path = FOLDER) -> None:
    """Save the two figures beside the results."""
    figure = Figure(figsize=(5 * len(suites), 6.2), layout="constrained")
    for axes, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites, strict=True):
        draw_trade_off(axes, suite)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(folder / "trade_off.png", dpi=110)
    figure = Figure(figsize=(5 * len(suites), 3.5), layout="constrained")
    for axes, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites, strict=True):
        draw_radii(axes, suite, "TPGM, mars", folder)
    axes.legend()
    figure.savefig(folder / "radii.png", dpi=110)


def put(text: str, name: str, table: str) -> str:
    """The text with a table between the marks of this name."""
    begin, end = (f"<!-- table of {name}: {edge} -->\n" for edge in ("begin", "end"))
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


def documents() -> dict[Path, str]:
    """The two READMEs, with the tables of the committed results in them."""
    suites = [SuiteResults(name) for name in present()]
    tried = [suite for suite in suites if any(lead.name in suite.chosen for lead in LEADS)]
    rivals = [method for method in METHODS if method.name in ("plain fine-tuning", "TPGM, mars", "TPGM, l2")]
    details = put(DETAILS.read_text(), "settings", settings_table(suites))
    details = put(details, "other conditions", elsewhere_table(suites))
    return {
        OVERVIEW: put(OVERVIEW.read_text(), "all methods", table(suites)),
        DETAILS: put(details, "leads", table(tried, (*rivals, *FIXED, *LEADS))),
    }


def main() -> None:
    """Write the READMEs' tables and the figures, or print what another folder holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args()
    suites = [SuiteResults(name, arguments.results) for name in present(arguments.results)]
    draw(suites, arguments.results)
    print(table(suites), settings_table(suites), sep="\n")
    if arguments.results == FOLDER:
        for path, text in documents().items():
            path.write_text(text)


if __name__ == "__main__":
    main()
