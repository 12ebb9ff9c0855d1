"""The benchmark's machinery, on the digits suite cut to a few images; and the README's table against its results."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import benchmark
import cache
import summary
from leads import LEADS
from methods import ALPHAS, FIXED, METHODS, PLAIN, POST_HOC, PRETRAINED, WISE_FT, Method
from results import Result, append, choose, mean_and_error, of, read
from suite import Suite, load_suite


class Immediately:
    """A pool that carries out what is submitted before it returns."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        self.count += 1
        future: Future[Any] = Future()
        future.set_result(function())
        return future


def result(seed: int = 0, choice: float = 0.5, settings: dict[str, Any] | None = None, **accuracies: float) -> Result:
    return Result("method", settings or {}, seed, choice, accuracies, seconds=1.0)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [
        replace(result(seed, settings={"lr": 0.1}, here=0.25, there=0.5), radii=[("weight", 0.5, 0.25)])
        for seed in (0, 1)
    ]
    for each in written:
        append(tmp_path / "suite.csv", each)
    assert read(tmp_path / "suite.csv") == written
    assert (tmp_path / "suite_radii.csv").read_text().splitlines() == [
        "method,settings,parameter,radius,distance",
        'method,"{""lr"": 0.1}",weight,0.5,0.25',
    ]
    assert read(tmp_path / "none.csv") == []


def test_choice_takes_the_best_mean_and_among_equals_the_first() -> None:
    found = [
        result(seed, choice, settings={"k": k})
        for k, choices in {1: (0.5, 0.7), 2: (0.9, 0.3), 3: (0.4, 0.4)}.items()
        for seed, choice in enumerate(choices)
    ]
    grid = [{"k": 3}, {"k": 2}, {"k": 1}]
    assert choose(found, "method", grid, [0, 1]) == {"k": 2}
    assert choose(found, "method", grid, [1]) == {"k": 1}
    with pytest.raises(LookupError, match=r"seeds \[2\]"):
        choose(found, "method", grid, [0, 1, 2])


def test_results_of_a_setting_come_in_the_order_of_the_seeds() -> None:
    found = [result(seed) for seed in (2, 0, 1)]
    assert [each.seed for each in of(found, "method", {}, [0, 1, 2])] == [0, 1, 2]


def test_standard_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Suite:
    """The digits suite with 40 training images, and its cache in a folder of its own.

    Scored in float32: bfloat16, which the benchmark is faster in, takes 20 times as long on processors without it.
    """
    digits = load_suite("digits")

    def data(seed: int) -> Any:
        every = digits.data(seed)
        every.train, every.choice = (TensorDataset(*part[:40]) for part in (every.train, every.choice))
        every.domains = {name: TensorDataset(*domain[:30]) for name, domain in every.domains.items()}
        return every

    elsewhere = dict(list(digits.elsewhere.items())[-1:])  # one condition is enough
    suite = replace(digits, data=data, selection_seeds=1, elsewhere=elsewhere)
    monkeypatch.setattr(benchmark, "load_suite", lambda name: suite)
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    return suite


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # benchmark runs are silent: they switch warnings off
def test_every_method_runs_and_nothing_runs_twice(small: Suite, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="EMA came with lightning 2.6")
    pool = Immediately()
    first = benchmark.Benchmark(small, tmp_path, pool, seeds=2, epochs=1)
    methods = [method.first() for method in METHODS]
    first.run(methods)
    assert set(first.chosen) == {method.name for method in METHODS}
    carried_out = pool.count
    again = benchmark.Benchmark(small, tmp_path, pool, seeds=2, epochs=1)
    again.run(methods)
    assert pool.count == carried_out
    assert again.chosen == first.chosen

    (tmp_path / "digits.json").write_text(json.dumps(again.describe()))
    found = summary.SuiteResults("digits", tmp_path)
    # the ends of WiSE-FT are the pretrained and the plainly fine-tuned module
    rates = found.chosen[PLAIN.name]
    ends = [found.of(WISE_FT.name, {**rates, "alpha": alpha}) for alpha in (ALPHAS[0], ALPHAS[-1])]
    assert [each.accuracies for each in ends[0]] == [each.accuracies for each in found.of(PRETRAINED.name)]
    assert [each.accuracies for each in ends[1]] == [each.accuracies for each in found.plain]
    assert found.gain(PLAIN.name, found.shifted) == (0.0, 0.0)
    assert summary.table([found]).count("\n") == len(METHODS) + len(FIXED) + 3
    with pytest.raises(SystemExit, match="1 epochs and 2 seeds, asked for are 3 and 2"):
        benchmark.Benchmark(small, tmp_path, pool, seeds=2, epochs=3)
    summary.draw([found], tmp_path)
    assert (tmp_path / "trade_off.png").stat().st_size > 10_000


@pytest.mark.parametrize("lead", LEADS, ids=lambda lead: lead.name)
def test_every_lead_does_something_else(lead: Method, small: Suite) -> None:
    rates = {"lr": 3e-3, "probe_lr": 1e-3}
    settings = {**rates, "norm": "l2" if lead.name.endswith("l2") else "mars", "radius_lr": 0.1}
    usual = benchmark.Run("digits", "TPGM, mars", settings, 0, 1).carry_out()
    found = benchmark.Run("digits", lead.name, {**rates, **lead.grid[-1]}, 0, 1).carry_out()
    assert found.radii != usual.radii


def test_another_optimizer(small: Suite) -> None:
    settings = {"lr": 1e-2, "probe_lr": 1e-3}
    adam, sgd = (
        benchmark.Run("digits", PLAIN.name, {**settings, **own}, 0, 1).carry_out().accuracies
        for own in ({}, {"momentum": 0.9})
    )
    assert adam != sgd


def test_post_hoc_projection_changes_the_fine_tuned_module(small: Suite) -> None:
    settings = {"lr": 3e-3, "probe_lr": 1e-3}
    plain, projected = (
        benchmark.Run("digits", method.name, {**settings, **own}, 0, 2).carry_out().accuracies
        for method, own in ((PLAIN, {}), (POST_HOC, {"radius_steps": 2}))
    )
    assert plain != projected


@pytest.mark.parametrize("name", summary.present())
def test_committed_results_are_complete(name: str) -> None:
    suite = summary.SuiteResults(name)
    assert suite.seeds == list(range(benchmark.SEEDS))
    for method in (*METHODS, *FIXED):
        assert len(suite.of(method.name)) == benchmark.SEEDS
        columns = [domain for domains in suite.columns.values() for domain in domains]
        assert set(columns) == set(suite.plain[0].accuracies)


def test_readmes_have_the_tables_of_the_committed_results() -> None:
    assert len(summary.present()) >= 2
    for path, text in summary.documents().items():
        assert path.read_text() == text


def test_put_changes_nothing_but_what_is_between_the_marks() -> None:
    text = "a\n<!-- table of x: begin -->\nold\n<!-- table of x: end -->\nb\n"
    assert summary.put(text, "x", "new\n") == text.replace("old", "new")
