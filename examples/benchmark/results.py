"""The results: one row for each model that was tested, in a CSV file a suite."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

FOLDER = Path(__file__).parent / "results"
FIELDS = ("method", "condition", "lr", "settings", "seed", "alpha", "held_out", "choice", "seconds")


@dataclass(frozen=True)
class Run:
    """One fit.

    Attributes:
        method: Its name.
        condition: "usual", or the name of one of the suite's.
        lr: Learning rate of the fine-tuning.
        settings: Of the method, where they are not its defaults.
        seed: Of the split, the order of the data, and the dropout; on emoji the fold.
    """

    method: str
    condition: str
    lr: float
    settings: tuple[tuple[str, Any], ...]
    seed: int


@dataclass(frozen=True)
class Result:
    """What one tested model is worth.

    Attributes:
        run: The fit; its method is that of the row, WiSE-FT for instance.
        alpha: Of the interpolation with the pretrained weights, 1 if there is none.
        held_out: Accuracy on the validation data, which sweeps choose alpha by.
        choice: Accuracy on the data in distribution that rates and settings are chosen by.
        accuracies: By test domain, the one in distribution first.
        seconds: Of the fit, on one core.
    """

    run: Run
    alpha: float
    held_out: float
    choice: float
    accuracies: Mapping[str, float]
    seconds: float

    def mean(self, domains: Sequence[str]) -> float:
        """Mean accuracy over these domains, in percent."""
        return 100 * fmean(self.accuracies[domain] for domain in domains)


def read(path: Path) -> list[Result]:
    """Read all results of a suite; none if there is no file."""
    return [_result(row) for row in read_rows(path)]


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV file; none if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a CSV file, which begins with the names of its columns."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _result(row: dict[str, str]) -> Result:
    method, condition, lr, settings, seed, alpha, held_out, choice, seconds = (row.pop(name) for name in FIELDS)
    run = Run(method, condition, float(lr), tuple(sorted(json.loads(settings).items())), int(seed))
    accuracies = {domain: float(value) for domain, value in row.items()}
    return Result(run, float(alpha), float(held_out), float(choice), accuracies, float(seconds))


def append(path: Path, results: Iterable[Result]) -> None:
    """Add one row each."""
    for result in results:
        run = result.run
        values = (run.method, run.condition, f"{run.lr:g}", json.dumps(dict(run.settings)), run.seed)
        numbers = (f"{result.alpha:g}", f"{result.held_out:.4f}", f"{result.choice:.4f}", f"{result.seconds:.1f}")
        row = dict(zip(FIELDS, (*values, *numbers), strict=True))
        row |= {domain: f"{accuracy:.4f}" for domain, accuracy in result.accuracies.items()}
        append_row(path, row)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the latter is nan for a single value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
