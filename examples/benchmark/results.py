"""The results: one row a run in a CSV file a suite, and what follows from them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

FOLDER = Path(__file__).parent / "results"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Attributes:
        method: Its name.
        settings: All of the run's, the learning rates included.
        seed: Of the run.
        choice: Accuracy on the data in distribution that settings are chosen by.
        accuracies: By test domain, the one in distribution first.
        seconds: The run took, on one core; little where an earlier run had stored the weights.
        radii: Name, radius and distance of each constrained parameter, for the methods that learn radii.
    """

    method: str
    settings: Settings
    seed: int
    choice: float
    accuracies: Mapping[str, float]
    seconds: float
    radii: Sequence[tuple[str, float, float]] = field(default=(), compare=False)

    def mean(self, domains: Sequence[str]) -> float:
        """Mean accuracy over these domains."""
        return fmean(self.accuracies[domain] for domain in domains)


def read(path: Path) -> list[Result]:
    """Read all results of a suite; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Result(
                row.pop("method"),
                json.loads(row.pop("settings")),
                int(row.pop("seed")),
                float(row.pop("choice")),
                seconds=float(row.pop("seconds")),
                accuracies={domain: float(value) for domain, value in row.items()},
            )
            for row in csv.DictReader(file)
        ]


def append(path: Path, result: Result) -> None:
    """Add one row; and the radii of a run with seed 0, in a file beside it."""
    row = {
        "method": result.method,
        "settings": json.dumps(result.settings, sort_keys=True),
        "seed": result.seed,
        "choice": f"{result.choice:.4f}",
        "seconds": f"{result.seconds:.1f}",
        **{domain: f"{accuracy:.4f}" for domain, accuracy in result.accuracies.items()},
    }
    _write(path, [row])
    if result.seed == 0:
        key = {name: row[name] for name in ("method", "settings")}
        rows = [
            key | {"parameter": name, "radius": f"{radius:.6g}", "distance": f"{distance:.6g}"}
            for name, radius, distance in result.radii
        ]
        _write(path.with_name(f"{path.stem}_radii.csv"), rows)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def of(results: Iterable[Result], method: str, settings: Settings, seeds: Iterable[int]) -> list[Result]:
    """The results of one setting, in the order of the seeds.

    Raises:
        LookupError: If one is missing.
    """
    by_seed = {result.seed: result for result in results if (result.method, result.settings) == (method, settings)}
    missing = [seed for seed in seeds if seed not in by_seed]
    if missing:
        raise LookupError(f"no results of {method}, {dict(settings)}, with the seeds {missing}")
    return [by_seed[seed] for seed in seeds]


def choose(results: Iterable[Result], method: str, grid: Iterable[Settings], seeds: Sequence[int]) -> Settings:
    """The setting with the highest mean accuracy on the choice data over these seeds; among equals the first."""

    def accuracy(settings: Settings) -> float:
        return fmean(result.choice for result in of(results, method, settings, seeds))

    return max(grid, key=accuracy)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the latter is nan for a single value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
