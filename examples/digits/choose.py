"""Choose `radius_lr` and `radius_steps` for demo.py, on in-distribution data alone.

Every setting is run with several seeds and judged on 100 digits a seed that serve neither training, nor the radii, nor
testing (`Digits.choice`). The rule holds for each norm. Candidates are the settings whose mean accuracy on these digits
is within one standard error of the best setting's. Of these it takes the one whose radii can move least. That is the
smallest `radius_lr * radius_steps`, then the fewest steps. Accuracies on the test digits and the shifted domains are
reported in columns of their own, which the rule does not look at.

    python examples/digits/choose.py

Runs already in the results file are not repeated, so an interrupted grid can be taken up again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import lightning
import torch
from rich.console import Console
from rich.table import Table

import lightning_tpgm
from data import Digits, shifted_domains
from experiment import evaluate, fine_tune, mean_accuracy, quieten_lightning

RESULTS = Path(__file__).parent / "results" / "choose.csv"
SEEDS = range(100, 104)  # none of the demo's
VERSIONS = {module.__name__: module.__version__ for module in (lightning_tpgm, lightning, torch)}


class Setting(NamedTuple):
    """One point of the grid."""

    norm: str
    radius_lr: float
    radius_steps: int


class Result(NamedTuple):
    """What one run is worth: `choice_*` is for the rule, the rest for the reader."""

    choice_accuracy: float
    choice_loss: float
    test_accuracy: float
    shifted_accuracy: float
    seconds: float


PLAIN = Setting("none", 0.0, 0)
GRID = [PLAIN, *itertools.starmap(Setting, itertools.product(("mars", "l2"), (0.01, 0.03, 0.1, 0.3), (1, 2)))]
Results = Mapping[Setting, Mapping[int, Result]]  # by setting and seed


def run(setting: Setting, seed: int) -> Result:
    """Fine-tune with one setting and one seed."""
    digits = Digits(seed)
    callbacks = [] if setting == PLAIN else [lightning_tpgm.TPGMCallback(every_n_steps=1, **setting._asdict())]
    model, seconds = fine_tune(digits, callbacks)
    return Result(
        *evaluate(model, digits.choice),
        evaluate(model, digits.test).accuracy,
        mean_accuracy(model, shifted_domains()),
        seconds,
    )


def read_results(path: Path) -> dict[Setting, dict[int, Result]]:
    """Read the runs that `path` has, if it exists."""
    results: dict[Setting, dict[int, Result]] = {setting: {} for setting in GRID}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                setting = Setting(row["norm"], float(row["radius_lr"]), int(row["radius_steps"]))
                results[setting][int(row["seed"])] = Result(*(float(row[field]) for field in Result._fields))
    return results


def append_result(path: Path, setting: Setting, seed: int, result: Result) -> None:
    """Add one run, and the versions it was made with, to `path`."""
    numbers = {name: f"{value:.4f}" for name, value in result._asdict().items()}
    row = {**setting._asdict(), "seed": seed, **numbers, **VERSIONS}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def choose(results: Results, norm: str) -> Setting:
    """Apply the rule at the top of this file to the settings of one norm."""
    accuracies = {
        setting: [result.choice_accuracy for result in by_seed.values()]
        for setting, by_seed in results.items()
        if setting.norm == norm
    }
    best = max(accuracies.values(), key=fmean)
    good_enough = fmean(best) - stdev(best) / math.sqrt(len(best))
    candidates = [setting for setting, values in accuracies.items() if fmean(values) >= good_enough]
    return min(candidates, key=lambda setting: (setting.radius_lr * setting.radius_steps, setting.radius_steps))


def summary(results: Results, chosen: Sequence[Setting]) -> Table:
    """Tabulate the means over the seeds, the chosen settings marked."""
    table = Table(caption="Means over the seeds. Only the choice digits decide; * marks what they chose.")
    for heading in ("norm", "radius_lr", "steps", "", "choice", "loss", "test", "shifted", "fit, s"):
        table.add_column(heading, justify="right")
    for setting, by_seed in results.items():
        mean = Result(*map(fmean, zip(*by_seed.values(), strict=True)))
        table.add_row(
            *map(str, setting),
            "*" if setting in chosen else "",
            f"{mean.choice_accuracy:.1%}",
            f"{mean.choice_loss:.4f}",
            f"{mean.test_accuracy:.1%}",
            f"{mean.shifted_accuracy:.1%}",
            f"{mean.seconds:.1f}",
        )
    return table


def main() -> None:
    """Run what is missing of the grid, then print the summary and the choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file to extend (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)

    quieten_lightning()
    console = Console()
    results = read_results(arguments.results)
    for seed, setting in itertools.product(SEEDS, GRID):
        if seed not in results[setting]:
            results[setting][seed] = run(setting, seed)
            append_result(arguments.results, setting, seed, results[setting][seed])
            console.print(f"seed {seed}: {', '.join(map(str, setting))} done")
    console.print(summary(results, [choose(results, norm) for norm in ("mars", "l2")]))


if __name__ == "__main__":
    main()
