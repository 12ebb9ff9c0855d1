"""The results of a suite, and what tables and figures ask of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from losses import NAME
from methods import FIXED_RATES, TPGM
from results import FOLDER, Result, Run, mean_and_error, read, read_rows
from suite import SUITES, USUAL

IN_DISTRIBUTION = "in distribution"


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
        self.columns = {IN_DISTRIBUTION: [description["in_distribution"]], **description["groups"]}
        self.shifted = [domain for domains in description["groups"].values() for domain in domains]
        self.both = ((IN_DISTRIBUTION, self.columns[IN_DISTRIBUTION]), ("shifted", self.shifted))
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
        return paired(self.of(method, condition, lr), self.of(other, condition, lr))

    def over_rates(
        self, method: str, other: str, domains: Sequence[str], condition: str = USUAL
    ) -> tuple[float, float]:
        """The difference of two methods, averaged over the learning rates of each seed: its mean and standard error."""
        rates = self.rates if condition == USUAL else self.conditions[condition]["rates"]
        by_seed: dict[int, list[float]] = {}
        for lr in rates:
            for result, against in self.pairs(method, other, condition, lr):
                by_seed.setdefault(result.run.seed, []).extend(differences([(result, against)], domains))
        complete = [fmean(values) for values in by_seed.values() if len(values) == len(rates)]
        return mean_and_error(complete) if complete else (math.nan, math.nan)

    def radius_rates(self, lr: float) -> list[list[Result]]:
        """TPGM with its automatic rate, then with each fixed one, at the seeds that all have; nothing without any."""
        return at_common_seeds([self.of(TPGM, USUAL, lr, settings) for settings in ({}, *FIXED_RATES)])

    def within_one_error(self, lr: float, domains: Sequence[str]) -> bool | None:
        """Whether the automatic rate is within a standard error of the best fixed one; None if one was not run."""
        if not (runs := self.radius_rates(lr)):
            return None
        auto, *fixed = runs
        best = max(fixed, key=lambda run: fmean(result.mean(domains) for result in run))
        difference, error = mean_and_error(differences(list(zip(auto, best, strict=True)), domains))
        return difference >= -error


def at_common_seeds(runs: Sequence[Sequence[Result]]) -> list[list[Result]]:
    """Of each run the seeds that all of them have; nothing if there is none."""
    common = set.intersection(*({result.run.seed for result in run} for run in runs)) if runs else set()
    return [[result for result in run if result.run.seed in common] for run in runs] if common else []


def paired(found: Sequence[Result], others: Sequence[Result]) -> list[tuple[Result, Result]]:
    """The results of the same seeds."""
    of_seed = {result.run.seed: result for result in others}
    return [(result, of_seed[result.run.seed]) for result in found if result.run.seed in of_seed]


def differences(pairs: Sequence[tuple[Result, Result]], domains: Sequence[str]) -> list[float]:
    """By how many points the first of each pair is more accurate."""
    return [result.mean(domains) - other.mean(domains) for result, other in pairs]
