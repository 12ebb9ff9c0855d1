"""The benchmark's machinery, on the digits suite cut to a few images; and its README's tables against its results."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import benchmark
import cache
import losses
import summary
import targets
from leads import FROM_SWEEP, ONE_BY_ONE, ROTATING, Certain, OneRatio
from lightning_tpgm.methods.radii import Radii
from methods import (
    AFTER,
    CADENCES,
    IN_TURN_OR_HALF,
    METHODS,
    OTHER_DATA,
    OTHER_LOSSES,
    PLAIN,
    SHOWN,
    TPGM,
    TPGM_SWEEP,
    TRIED,
    TRIED_LATER,
    WISE_FT,
)
from results import FOLDER, Result, Run, append, append_row, mean_and_error, read
from suite import Suite, load_suite


@pytest.fixture(autouse=True)
def as_loud_as_before() -> Iterator[None]:
    """A process of the benchmark is silent for good."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


class Immediately:
    """A pool that carries out what is submitted before it returns."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self.count += 1
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def run(method: str = "method", lr: float = 0.1, settings: tuple[tuple[str, Any], ...] = (), seed: int = 0) -> Run:
    return Run(method, "usual", lr, settings, seed)


def result(of: Run, choice: float = 0.5, **accuracies: float) -> Result:
    return Result(of, 1.0, 0.75, choice, accuracies, 1.5)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [result(run(settings=(("radius_lr", 0.1),), seed=seed), here=0.25, there=0.5) for seed in (0, 1)]
    append(tmp_path / "suite.csv", written[:1])
    append(tmp_path / "suite.csv", written[1:])
    assert read(tmp_path / "suite.csv") == written
    assert read(tmp_path / "none.csv") == []


def test_standard_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))


def test_a_cell_holds_the_paired_difference() -> None:
    pairs = [(result(run(seed=seed), here=0.5 + 0.1 * seed), result(run(PLAIN), here=0.4)) for seed in (0, 1)]
    assert summary.cell(pairs, ["here"]) == "55.0 (+15.0 ± 5.0)"
    assert summary.cell([(plain, plain) for _, plain in pairs], ["here"]) == "40.0"
    assert summary.cell([], ["here"]) == ""


def suite_results(found: list[Result]) -> summary.SuiteResults:
    """Results as if they had been read."""
    suite = object.__new__(summary.SuiteResults)
    suite.name, suite.rates, suite.conditions = "made up", [0.1, 0.2], {}
    suite.columns, suite.shifted = {"in distribution": ["here"], "shifted": ["there"]}, ["there"]
    suite.both = tuple(suite.columns.items())
    suite._found = {each.run: each for each in found}
    return suite


EMA_AT_09 = (("decay", 0.9),)


def grid_of_ema(*runs: tuple[float, tuple[tuple[str, Any], ...], dict[int, float]]) -> list[Result]:
    """Accuracies on the choice data by seed; what is best there is worst on the test data."""
    return [
        result(run("EMA", lr, settings, seed), choice, here=1 - choice, there=0.0)
        for lr, settings, choices in runs
        for seed, choice in choices.items()
    ]


def chosen(found: list[Result]) -> tuple[float, dict[str, Any], list[int]]:
    best = summary.tuned(suite_results(found), "EMA")
    return best[0].run.lr, dict(best[0].run.settings), [each.run.seed for each in best]


def test_the_tuned_row_takes_the_best_on_the_choice_data_and_never_looks_at_test_data() -> None:
    found = grid_of_ema((0.1, (), {0: 0.7, 1: 0.7}), (0.2, (), {0: 0.6, 1: 0.6}), (0.2, EMA_AT_09, {0: 0.9, 1: 0.9}))
    assert chosen(found) == (0.2, {"decay": 0.9}, [0, 1])
    assert summary.tuned(suite_results(found), "FTP") == []


def test_a_setting_with_fewer_seeds_than_the_default_is_compared_on_those() -> None:
    """Here on seed 1 alone, where it is best; of the default seed 0 would be better than that."""
    setting = (0.1, EMA_AT_09, {1: 0.6})
    found = grid_of_ema((0.1, (), {0: 0.9, 1: 0.5}), (0.2, (), {0: 0.9, 1: 0.4, 2: 1.0}), setting)
    assert chosen(found) == (0.1, {"decay": 0.9}, [1])
    worse = grid_of_ema((0.1, (), {0: 0.1, 1: 0.5}), (0.2, (), {0: 0.9, 1: 0.4}), (0.1, EMA_AT_09, {1: 0.3}))
    assert chosen(worse) == (0.1, {}, [0, 1]), "chosen by seed 1, reported on both"
    suites = [suite_results(each) for each in (found, [each for each in worse if not each.run.settings])]
    assert "| EMA | 1 of 2, 2 seeds |" in summary.compared_settings_table(suites[1:])
    assert "| EMA | 2 of 2, 1 seed |" in summary.compared_settings_table(suites[:1])


def test_the_sweep_after_tpgm_has_the_settings_of_its_fit() -> None:
    assert summary.grid(TPGM_SWEEP) == summary.grid(TPGM) == [{}, {"norm": "l2"}]


def test_the_overview_has_means_over_the_rates_and_in_brackets_the_tuned_ones_on_common_seeds() -> None:
    found = [
        result(run(method, lr, seed=seed), choice=lr, here=lr + 0.1 * seed, there=0.0)
        for method in (PLAIN, WISE_FT, "FTP", TPGM, TPGM_SWEEP)
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    found += [result(run("FTP", 0.2, (("k", 0.0),), 1), choice=0.3, here=0.9, there=0.0)]
    table = summary.overview_table([suite_results(found)])
    assert f"| {TPGM} | 20.0 (30.0) | 0.0 (0.0) |" in table
    assert "| FTP | 20.0 (90.0) | 0.0 (0.0) |" in table
    lacking = suite_results([each for each in found if each.run.method != TPGM])
    assert f"| {PLAIN} | 20.0 | 0.0 |" in summary.overview_table([lacking])


def test_averages_over_rates_leave_out_seeds_that_lack_one() -> None:
    found = [
        result(run(method, lr, seed=seed), here=value, there=0.0)
        for method, value in ((PLAIN, 0.5), (TPGM, 0.6))
        for lr in (0.1, 0.2)
        for seed in (0, 1, 2)
        if (method, lr, seed) != (TPGM, 0.2, 2)
    ]
    mean, error = suite_results(found).over_rates(TPGM, PLAIN, ["here"])
    assert (mean, error) == pytest.approx((10.0, 0.0))


def test_whether_auto_is_within_an_error_of_the_best_fixed_rate() -> None:
    def suite(auto: tuple[float, ...]) -> summary.SuiteResults:
        fixed = [
            result(run(TPGM, 0.1, (("radius_lr", rate),), seed), here=0.5 + 0.05 * seed)
            for rate in (0.001, 0.01, 0.1, 1.0)
            for seed in (0, 2)
        ]
        seeds = (0, 2) if len(auto) == 2 else (0, 1, 2)
        found = (result(run(TPGM, 0.1, seed=seed), here=value) for seed, value in zip(seeds, auto, strict=True))
        return suite_results([*fixed, *found])

    assert suite((0.5, 0.58)).within_one_error(0.1, ["here"])
    assert not suite((0.4, 0.5)).within_one_error(0.1, ["here"])
    assert suite((0.4, 0.5)).within_one_error(0.2, ["here"]) is None
    for other in (0.0, 1.0):  # the fixed rates have no seed 1
        assert suite((0.5, other, 0.6)).within_one_error(0.1, ["here"])
        seeds = [[each.run.seed for each in runs] for runs in suite((0.5, other, 0.6)).radius_rates(0.1)]
        assert seeds == [[0, 2]] * 5


def test_targets_are_judged_by_what_was_found() -> None:
    """Six targets of a suite that was run at two rates; the seventh needs fixed rates of the radii."""

    def judged(tpgm: tuple[float, float], wise_ft: float = 0.5) -> dict[str, tuple[str, bool]]:
        accuracies = {PLAIN: (0.6, 0.5), TPGM: tpgm, TPGM_SWEEP: (0.6, 0.6), WISE_FT: (0.6, wise_ft)}
        found = [
            result(run(method, lr, seed=seed), here=here, there=there - (lr - 0.1))
            for method, (here, there) in accuracies.items()
            for lr in (0.1, 0.2)
            for seed in (0, 1)
        ]
        return {target: (found, met) for target, _, found, met in targets.rows([suite_results(found)])}

    better = judged((0.61, 0.6))
    assert better["shifted, the worst rate within 1.5 of plain's best"] == ("50.0 against 50.0", True)
    assert better["in distribution, at no rate below plain by more than 1"] == ("+1.0 at 0.1", True)
    assert better["in distribution, above plain on average"] == ("+1.0 ± 0.0", True)
    assert better["shifted, the sweep after TPGM above WiSE-FT by two errors"] == ("+10.0 ± 0.0", True)
    worse = judged((0.58, 0.58), wise_ft=0.65)
    assert worse["shifted, the worst rate within 1.5 of plain's best"] == ("48.0 against 50.0", False)
    assert worse["in distribution, at no rate below plain by more than 1"] == ("-2.0 at 0.1", False)
    assert worse["in distribution, above plain on average"] == ("-2.0 ± 0.0", False)
    assert worse["shifted, the sweep after TPGM above WiSE-FT by two errors"] == ("-5.0 ± 0.0", False)
    nowhere = "the sweep after TPGM nowhere below WiSE-FT by more than an error"
    assert (better[nowhere], worse[nowhere]) == (
        ("+0.0 ± 0.0 in distribution, usual", True),
        ("-5.0 ± 0.0 shifted, usual", False),
    )
    assert len(worse) == 6


def test_standard_errors_on_emoji_are_judged() -> None:
    for gains, found in (((0.1, 0.11), ("0.5 to 0.5", True)), ((0.1, 0.2), ("5.0 to 5.0", False))):
        results = [
            result(run(method, lr, seed=seed), here=0.5, there=0.5 + gain * (method == TPGM))
            for method in (PLAIN, TPGM)
            for lr in (0.1, 0.2)
            for seed, gain in enumerate(gains)
        ]
        suite = suite_results(results)
        suite.name = "emoji"
        rows = {target: (text, met) for target, _, text, met in targets.rows([suite])}
        assert rows["standard errors of these differences on groups of styles: 0.7"] == found


def test_the_largest_standard_error_on_emoji_is_judged() -> None:
    """A rate of one seed has none."""
    results = [
        result(run(method, lr, seed=seed), here=0.5, there=0.5 + (method == TPGM) * seed * gain)
        for method in (PLAIN, TPGM)
        for lr, gain, seeds in ((0.05, 0.0, (0,)), (0.1, 0.01, (0, 1)), (0.2, 0.1, (0, 1)))
        for seed in seeds
    ]
    suite = suite_results(results)
    suite.name, suite.rates = "emoji", [0.05, 0.1, 0.2]
    rows = {target: (text, met) for target, _, text, met in targets.rows([suite])}
    assert rows["standard errors of these differences on groups of styles: 0.7"] == ("0.5 to 5.0", False)


@pytest.mark.parametrize(
    ("condition", "here", "found"),
    [
        ("usual", (-0.01, -0.012), ("-1.1 ± 0.1 in distribution, usual", False)),
        ("long", (0.05, 0.05), ("-2.0 ± 3.0 shifted, long", True)),
    ],
)
def test_what_the_sweep_loses_is_judged_by_its_error(
    condition: str, here: tuple[float, float], found: tuple[str, bool]
) -> None:
    """The worst is what is lost beyond its error, not the largest loss, in any condition."""
    suite = suite_results(
        [
            result(Run(method, condition, 0.1, (), seed), here=0.5 + change, there=0.5 + there)
            for method, changes in ((WISE_FT, ((0, 0), (0, 0))), (TPGM_SWEEP, zip(here, (-0.05, 0.01), strict=True)))
            for seed, (change, there) in enumerate(changes)
        ]
    )
    suite.rates, suite.conditions = [0.1], {"long": {"rates": [0.1]}}
    rows = {target: (text, met) for target, _, text, met in targets.rows([suite])}
    assert rows["the sweep after TPGM nowhere below WiSE-FT by more than an error"] == found


def test_the_worst_two_seeds_of_digits_are_judged() -> None:
    gains = (0.3, 0.005, 0.013)
    found = [
        result(run(method, 0.001, seed=seed), here=0.9, there=0.5 + gain * (method == TPGM))
        for method in (PLAIN, TPGM)
        for seed, gain in enumerate(gains)
    ]
    suite = suite_results(found)
    suite.name = "digits"
    rows = {target: (found, met) for target, where, found, met in targets.rows([suite]) if where == "digits, 0.001"}
    assert rows["shifted, any two seeds: +1.0"] == ("+10.6 ± 9.7, the worst two +0.90", False)
    assert rows["in distribution, any two seeds: -0.5"] == ("+0.0 ± 0.0, the worst two +0.00", True)


def test_the_share_of_settings_in_which_the_automatic_rate_is_as_good() -> None:
    def counted(auto: float) -> tuple[str, bool]:
        rates = [((), auto), *(((("radius_lr", rate),), 0.5) for rate in (0.001, 0.01, 0.1, 1.0))]
        found = [
            result(run(TPGM, lr, settings, seed), here=value, there=0.5)
            for settings, value in rates
            for lr in (0.1, 0.2)
            for seed in (0, 1)
        ]
        *_, (_, where, share, met) = targets.rows([suite_results(found), suite_results([])])
        assert where == "made up", "the other suite has no fixed rates"
        return share, met

    assert counted(0.5) == ("4 of 4", True)
    assert counted(0.4) == ("2 of 4", False)


@pytest.mark.parametrize(("update", "found"), [(6.0, ("1.38 times", True)), (16.0, ("1.62 times", False))])
def test_the_time_of_a_step_is_judged(
    update: float, found: tuple[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it comes, with an update in one of four steps."""
    monkeypatch.setattr(targets, "TIMES", tmp_path / "times.csv")
    seconds = {"plain step": 10.0, "TPGM, mars": update, "TPGM, mars: projection": 3.0}
    for what, value in seconds.items():
        key = {"model": "digits CNN", "batch": 32, "parameters": 1, "tensors": 1}
        append_row(targets.TIMES, {**key, "what": what, "seconds": value, "rounds": 9})
    suite = suite_results([])
    suite.name = "digits"
    assert list(targets.rows([suite])) == [("at most 1.6 times plain's time", "digits, batches of 32", *found)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Suite:
    """The digits suite with 40 training images, and its cache in a folder of its own."""
    digits = load_suite("digits")

    def data(seed: int) -> Any:
        every = digits.data(seed)
        every.train, every.choice = (TensorDataset(*part[:40]) for part in (every.train, every.choice))
        every.domains = {name: TensorDataset(*domain[:30]) for name, domain in every.domains.items()}
        return every

    conditions = {name: {**digits.conditions[name], "rates": (3e-3,)} for name in ("cosine", "one-cycle", "SGD")}
    conditions["25 held out"] = {"held_out": 25, "rates": (3e-3,), "methods": (PLAIN, TPGM)}
    suite = replace(digits, data=data, rates=(1e-3, 3e-3), conditions=conditions)
    monkeypatch.setattr(benchmark, "load_suite", lambda name: suite)
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    return suite


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # benchmark runs are silent: they switch warnings off
def test_every_method_runs_and_nothing_runs_twice(small: Suite, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="EMA came with lightning 2.6")
    pool = Immediately()
    runs = list(benchmark.plan(small, range(1)))
    benchmark.benchmark(small, tmp_path, pool, runs, epochs=1)
    carried_out = pool.count
    grid = sum(len(each.others) for each in METHODS)
    of_questions = [2 * len(METHODS), 3 * len(METHODS) + 2, 2 * 4, 2 * grid, len(CADENCES), 2 * len(TRIED)]
    alone = len(OTHER_LOSSES) + 2 * len(OTHER_DATA)  # question 7 shares one of two rates with question 6
    alone += 2 * (len(TRIED_LATER) - 1)  # question 9 shares one of its five with question 6
    alone += 2 + 2 * len(IN_TURN_OR_HALF)
    assert carried_out == len(set(runs)) == sum(of_questions) + alone
    benchmark.benchmark(small, tmp_path, pool, runs, epochs=1)
    assert pool.count == carried_out

    for method in losses.COMPARED:
        numbers = {"loss": "0.1", "accuracy": "0.9"}
        append_row(tmp_path / losses.NAME, {"suite": "digits", "method": method, "lr": "0.001", "seed": "0", **numbers})
    found = summary.SuiteResults("digits", tmp_path)
    for method in SHOWN:
        for lr in small.rates:
            assert len(found.of(method, "usual", lr)) == 1
    for table in summary.TABLES.values():
        assert "digits" in table([found])
    summary.draw_rates([found], tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore")
def test_what_comes_of_a_fit(small: Suite) -> None:
    """Interpolated and projected weights are other weights than the fine-tuned ones, and the same ones each time."""
    fit = Run(PLAIN, "usual", 3e-3, (), 0)
    results = {each.run.method: each for each in benchmark.carry_out("digits", fit, 3)}
    assert set(results) == {PLAIN, WISE_FT, f"{WISE_FT}, best alpha", AFTER}
    assert results[PLAIN].accuracies != results[AFTER].accuracies
    assert results[WISE_FT].alpha <= results[f"{WISE_FT}, best alpha"].alpha
    again = {each.run.method: each for each in benchmark.carry_out("digits", fit, 3)}
    assert {name: each.accuracies for name, each in again.items()} == {
        name: each.accuracies for name, each in results.items()
    }
    tpgm = benchmark.carry_out("digits", Run(TPGM, "usual", 3e-3, (), 0), 1)
    assert {each.run.method for each in tpgm} == {TPGM, TPGM_SWEEP, f"{TPGM_SWEEP}, best alpha"}


@pytest.mark.parametrize(
    ("method", "condition"), [("FTP", "cosine"), ("FTP", "one-cycle"), ("FTP", "SGD"), (TPGM, "25 held out")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_condition_changes_the_fit(small: Suite, method: str, condition: str) -> None:
    usual, other = (benchmark.Fit(small, Run(method, name, 3e-3, (), 0), 3) for name in ("usual", condition))
    for fit in (usual, other):
        fit.train()
    ends = [fit.model.state_dict().values() for fit in (usual, other)]
    assert not all(map(torch.equal, *ends))


@pytest.mark.parametrize("name", ["batch", "held_out_batch", "precision"])
def test_a_condition_sets_batches_and_precision(small: Suite, name: str) -> None:
    value = "bf16-mixed" if name == "precision" else 7
    fit = benchmark.Fit(replace(small, conditions={"other": {name: value}}), Run(TPGM, "other", 3e-3, (), 0), 1)
    loaders = {"batch": fit.data.train_dataloader(), "held_out_batch": fit.data.tpgm_dataloader()}
    assert {**{key: loader.batch_size for key, loader in loaders.items()}, "precision": fit.precision} == {
        "batch": 32,
        "held_out_batch": 50,
        "precision": "32-true",
        name: value,
    }


@pytest.mark.parametrize(
    ("method", "settings"),
    [*TRIED, *TRIED_LATER[:3], TRIED_LATER[-1], *((TPGM, s) for s in (IN_TURN_OR_HALF[0], *OTHER_DATA))],
)
@pytest.mark.filterwarnings("ignore")
def test_an_idea_changes_its_method(small: Suite, method: str, settings: dict[str, Any]) -> None:
    assert_differ(small, method, {}, settings)


@pytest.mark.filterwarnings("ignore")
def test_radii_that_move_one_by_one_end_elsewhere(small: Suite) -> None:
    assert_differ(small, PLAIN, {"lead": FROM_SWEEP}, {"lead": ONE_BY_ONE})


def assert_differ(small: Suite, method: str, *settings: dict[str, Any]) -> None:
    """In the weights after the fact, if the fit is plain, or else in those of the fit."""
    ends = []
    for own in settings:
        fit = benchmark.Fit(small, Run(method, "usual", 3e-3, tuple(own.items()), 0), 8)
        fit.carry_out() if method == PLAIN else fit.train()
        ends.append([value.clone() for value in fit.model.state_dict().values()])
    assert not all(map(torch.equal, *ends))


def test_rotating_folds_hold_out_every_example_once(small: Suite) -> None:
    data = small.data(0)
    size, count = len(data.held_out), len(data.held_out) + len(data.train)
    folds = [data.fold(epoch) for epoch in range(count // size)]
    assert sorted(index for held_out, _ in folds for index in held_out) == list(range(count // size * size))
    assert all(sorted(held_out + trained) == list(range(count)) for held_out, trained in folds)


@pytest.mark.filterwarnings("ignore")
def test_each_epoch_of_rotating_folds_trains_on_what_it_does_not_hold_out(small: Suite) -> None:
    """As noted by a module in a fit: each batch that it trains on, and each that radii are learned from."""
    lead = Run(TPGM, "usual", 3e-3, (("lead", ROTATING),), 0)
    fit = benchmark.Fit(small, lead, 4)
    everything = [image.numpy().tobytes() for image, _ in fit.data.all()]
    trained, held_out = ([set[int]() for _ in range(4)] for _ in range(2))
    step = type(fit.model).training_step

    def noted(batch: Any, batch_idx: int) -> Any:
        of_epoch = (trained if fit.model.training else held_out)[fit.model.current_epoch]
        of_epoch |= {everything.index(image.numpy().tobytes()) for image in batch[0]}
        return step(fit.model, batch, batch_idx)

    fit.model.training_step = noted  # type: ignore[method-assign]
    fit.train()
    folds = [fit.data.fold(epoch) for epoch in range(4)]
    assert [sorted(indices) for indices in trained] == [indices for _, indices in folds]
    assert all(seen <= {*indices} for seen, (indices, _) in zip(held_out, folds, strict=True))
    assert [bool(seen) for seen in held_out] == [True, False, True, False], (
        "an epoch has two steps, every fourth counts"
    )


def test_one_ratio_per_block() -> None:
    radii = OneRatio(0.1)
    radii.add(["a.conv.weight", "a.norm.weight", "b.conv.weight", "b.norm.weight"])
    radii.value = torch.tensor([1.0, 2.0, 3.0, 9.0])
    radii.clamp(torch.tensor([2.0, 8.0, 4.0, 0.0]), torch.ones(4, dtype=torch.bool))
    assert radii.value.tolist() == [0.375 * 2, 0.375 * 8, 0.75 * 4, 0]


@pytest.mark.parametrize("first", ["features.0.", "network.blocks.0."])
def test_a_layer_of_the_network_itself_is_a_block_of_its_own(first: str) -> None:
    radii = OneRatio(0.1)
    radii.add([f"{first}{name}" for name in ("conv.weight", "norm.weight")])
    radii.add([f"{first.split('.')[0]}.{name}" for name in ("stem.weight", "head.weight", "head.bias")])
    assert len(radii.blocks().unique()) == 3


@pytest.mark.parametrize(("slopes", "moves"), [([1.0] * 9, True), ([1.0, -1.0] * 5, False)])
def test_radii_move_where_their_slopes_are_certain(slopes: list[float], moves: bool) -> None:
    found = {}
    for radii in (Certain(0.1), Radii(0.1)):
        radii.add(["weight"])
        radii.start(torch.ones(1))
        for slope in slopes:
            radii.adam(torch.tensor([slope]), torch.tensor([True]))
        found[type(radii)] = radii.value.item()
    assert (found[Certain] < 1) is moves
    assert found[Radii] != 1


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_so_much_of_what_radii_are_learned_from_is_training_data(small: Suite, share: float) -> None:
    data = small.data(0)
    data.training_share = share
    of_training = {image.numpy().tobytes() for image in data.train.tensors[0]}
    drawn = [image.numpy().tobytes() in of_training for images, _ in data.tpgm_dataloader() for image in images]
    assert sum(drawn) / len(drawn) == pytest.approx(share, abs=0.15)
    assert (sum(drawn) == len(drawn)) == (share == 1)


def test_other_numbers_of_held_out_examples_are_of_the_same_ones(small: Suite) -> None:
    usual, fewer, more = (small.data(0) for _ in range(3))
    fewer.hold_out(20)
    more.hold_out(130)
    assert torch.equal(fewer.held_out.tensors[0], usual.held_out.tensors[0][:20])
    assert torch.equal(more.held_out.tensors[1], torch.cat([usual.held_out.tensors[1], usual.choice.tensors[1][:30]]))
    assert len(fewer.train) == len(more.train) == len(usual.train)


def test_readmes_have_the_tables_of_the_committed_results() -> None:
    for path, text in summary.documents().items():
        assert path.read_text() == text


@pytest.mark.parametrize("output", [[], ["--output", os.path.relpath(FOLDER)]])
def test_other_epochs_than_the_suites_do_not_get_among_the_committed_results(
    output: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--epochs", "1", *output])
    monkeypatch.delattr(benchmark, "ProcessPoolExecutor")  # nothing is started
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--epochs needs an --output of its own" in capsys.readouterr().err


def test_losses_are_those_of_the_folder(tmp_path: Path) -> None:
    """Paired differences from plain fine-tuning, of the rates that were run with all three."""
    for seed, change in ((0, 0.1), (1, 0.3)):
        for method, loss in zip(losses.COMPARED, (1.0, 1.0 + change, 1.0 - change), strict=True):
            key = {"suite": "digits", "method": method, "lr": "0.001", "seed": seed}
            append_row(tmp_path / losses.NAME, {**key, "loss": loss, "accuracy": 0.5})
    (tmp_path / "digits.json").write_text((FOLDER / "digits.json").read_text())
    table = summary.losses_table([summary.SuiteResults("digits", tmp_path)])
    assert "| digits, 0.001 | loss | 1.000 | 1.200 (+0.200 ± 0.100) | 0.800 (-0.200 ± 0.100) |" in table
    assert table.count("digits") == 2


def test_put_changes_nothing_but_what_is_between_the_marks() -> None:
    text = "a\n<!-- table of x: begin -->\nold\n<!-- table of x: end -->\nb\n"
    assert summary.put(text, "x", "new\n") == text.replace("old", "new")


@pytest.mark.slow
def test_the_default_saves_a_fit_that_diverges() -> None:
    """SGD at 0.1 on digits. Radii that grew at the optimizer's pace from the first slopes on were lost with it."""
    found = {}
    for method in (PLAIN, TPGM):
        fit = benchmark.Fit(load_suite("digits"), Run(method, "SGD", 0.1, (), seed=0))
        fit.train()
        found[method] = [benchmark.accuracy(fit.model, fit.data.domains[domain]) for domain in ("digits", "rotated")]
    assert max(found[PLAIN]) < 0.2
    assert min(found[TPGM]) > 0.8


def test_loss_and_accuracy() -> None:
    fit = benchmark.Fit(load_suite("digits"), Run(PLAIN, "usual", 1e-3, (), seed=0))
    data = fit.data.domains["digits"]
    images, labels = data.tensors
    loss, accuracy = losses.loss_and_accuracy(fit.model, data)
    assert accuracy == benchmark.accuracy(fit.model, data)
    assert loss == pytest.approx(cross_entropy(fit.model.eval()(images), labels).item(), rel=1e-5)
