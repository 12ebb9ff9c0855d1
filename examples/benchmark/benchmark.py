"""Compare robust fine-tuning methods on real models and real domain shift.

    python examples/benchmark/prepare.py                      # once: data and pretrained weights
    python examples/benchmark/benchmark.py                    # every suite
    python examples/benchmark/benchmark.py --suites digits    # one of them

What is run, in which order, and what is reported, stands in protocol.md. Fits whose results are in the CSV files are
not repeated, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import lightning_tpgm
from leads import MIXES, ROTATING, after_the_fact
from lightning_tpgm import project_checkpoint, wise_ft_sweep
from methods import (
    AFTER,
    CADENCES,
    FIXED_RATES,
    IN_TURN_OR_HALF,
    METHODS,
    OTHER_DATA,
    OTHER_LOSSES,
    PLAIN,
    TPGM,
    TPGM_SWEEP,
    TRIED,
    TRIED_LATER,
    WISE_FT,
)
from results import FOLDER, Result, Run, append, read
from suite import COSINE, FEW, SUITES, USUAL, Suite, load_suite

RULE = "one_standard_error"
QUESTIONS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
State = Mapping[str, Tensor]


@torch.inference_mode()
def logits(model: LightningModule, data: TensorDataset) -> Tensor:
    """What `model` makes of all inputs, in eval mode, shape (count, classes)."""
    model.eval()
    return torch.cat([model(batch) for batch in data.tensors[0].split(100)])


def accuracy(model: LightningModule, data: TensorDataset) -> float:
    """Share of right answers of `model`, in eval mode."""
    return share_right(logits(model, data), data)


def share_right(answers: Tensor, data: TensorDataset) -> float:
    """The same from its logits."""
    return (answers.argmax(dim=1) == data.tensors[1]).double().mean().item()


def configure(model: LightningModule, condition: Mapping[str, Any], steps: int) -> None:
    """Give the module the optimizer and the schedule of a condition."""
    usual = model.configure_optimizers

    def optimizers() -> Any:
        optimizer = usual()
        lr = model.hparams["lr"]
        if "momentum" in condition:
            optimizer = torch.optim.SGD(model.parameters(), lr, momentum=condition["momentum"])
        schedule = condition.get("schedule")
        if schedule is None:
            return optimizer
        if schedule == "one-cycle":
            scheduler: Any = OneCycleLR(optimizer, lr, total_steps=steps)
        elif schedule == "steps":
            scheduler = MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])  # a tenth each time
        else:  # a tenth of the steps warms up, then half a cosine
            scheduler = LambdaLR(
                optimizer, lambda t: min(1, (t + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * t / steps)) / 2
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    model.configure_optimizers = optimizers  # type: ignore[method-assign]


class Fit:
    """One fit, and the models that come of it.

    Args:
        suite: Where.
        run: What.
        epochs: Instead of the suite's.
    """

    def __init__(self, suite: Suite, run: Run, epochs: int | None = None) -> None:
        self.suite, self.run = suite, run
        self.data = suite.data(run.seed)
        self.condition = {} if run.condition == USUAL else suite.conditions[run.condition]
        if "held_out" in self.condition:
            self.data.hold_out(int(self.condition["held_out"]))
        for name in ("batch", "held_out_batch"):
            setattr(self.data, name, self.condition.get(name, getattr(self.data, name)))
        self.lead = dict(run.settings).get("lead")
        self.data.training_share, self.data.rotates = MIXES.get(self.lead, 0.0), self.lead == ROTATING
        self.precision: Any = self.condition.get("precision", "32-true")
        epochs = suite.epochs if epochs is None else epochs
        batches = len(self.data.train_dataloader())
        self.steps = max(1, round(float(self.condition.get("length", 1)) * epochs * batches))
        seed_everything(run.seed, verbose=False)
        self.model = suite.model(run.seed, run.lr)
        self.pretrained = deepcopy(self.model.state_dict())

    def train(self) -> float:
        """Fine-tune; the seconds that it took."""
        (method,) = (each for each in METHODS if each.name == self.run.method)
        own = dict(self.run.settings)
        if method.constrains and self.suite.exclude:
            own["exclude"] = self.suite.exclude
        callbacks = [] if method.callback is None else [method.callback(**own)]
        configure(self.model, self.condition, self.steps)
        trainer = Trainer(
            **QUIET,
            precision=self.precision,
            max_epochs=-1,
            max_steps=self.steps,
            limit_val_batches=0,
            reload_dataloaders_every_n_epochs=int(self.data.rotates),
            callbacks=callbacks,
        )
        seed_everything(self.run.seed, verbose=False)
        started = time.perf_counter()
        trainer.fit(self.model, datamodule=self.data)
        return time.perf_counter() - started

    def carry_out(self) -> list[Result]:
        """Fine-tune, and test what comes of it."""
        seconds = self.train()
        end = deepcopy(self.model.state_dict())
        found = [self._test(self.run.method, end, 1.0, seconds)]
        if self.run.method == PLAIN:
            found += self._swept(WISE_FT, end, seconds)
            with after_the_fact(self.lead, found[-1].alpha):
                projected, more = self._after_the_fact(end)
            found.append(self._test(AFTER, projected, 1.0, seconds + more))
        if self.run.method == TPGM:
            found += self._swept(TPGM_SWEEP, end, seconds)
        return found

    def _swept(self, name: str, end: State, seconds: float) -> list[Result]:
        """Between the pretrained weights and these, where the sweep ends: by the rule, and without tolerance."""
        self.model.load_state_dict(end)
        sweep = wise_ft_sweep(
            Trainer(**QUIET, num_sanity_val_steps=0),  # type: ignore[arg-type]
            self.model,
            dict(self.pretrained),
            "val_acc",
            tolerance=RULE,
            exclude=self.suite.exclude,
            dataloaders=self.data.val_dataloader(),
        )
        by_rule = self._test(name, deepcopy(self.model.state_dict()), sweep.chosen_alpha, seconds)
        best = f"{name}, best alpha"
        if sweep.best_alpha == sweep.chosen_alpha:
            return [by_rule, replace(by_rule, run=replace(by_rule.run, method=best))]
        wise_ft_sweep(
            Trainer(**QUIET, num_sanity_val_steps=0),  # type: ignore[arg-type]
            self._holding(end),
            dict(self.pretrained),
            "val_acc",
            alphas=[sweep.best_alpha],
            exclude=self.suite.exclude,
            dataloaders=self.data.val_dataloader(),
        )
        return [by_rule, self._test(best, deepcopy(self.model.state_dict()), sweep.best_alpha, seconds)]

    def _after_the_fact(self, end: State) -> tuple[State, float]:
        """TPGM between the pretrained weights and these, and the seconds that it took."""
        loader = DataLoader(self.data.held_out, batch_size=50, shuffle=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            finetuned, output = Path(folder) / "finetuned.pt", Path(folder) / "projected.pt"
            torch.save(end, finetuned)
            trainer = Trainer(**QUIET, precision=self.precision)  # type: ignore[arg-type]
            options = {"exclude": self.suite.exclude, "trainer": trainer}
            project_checkpoint(self._holding(end), dict(self.pretrained), finetuned, loader, output, **options)
            return torch.load(output, weights_only=True), time.perf_counter() - started

    def _holding(self, state: State) -> LightningModule:
        self.model.load_state_dict(state)
        return self.model

    def _test(self, name: str, state: State, alpha: float, seconds: float) -> Result:
        model = self._holding(state)
        held_out, choice = (accuracy(model, data) for data in (self.data.held_out, self.data.choice))
        accuracies = {domain: accuracy(model, self.data.domains[domain]) for domain in self.suite.domains}
        return Result(replace(self.run, method=name), alpha, held_out, choice, accuracies, seconds)


def plan(suite: Suite, seeds: Sequence[int], questions: Sequence[int] = QUESTIONS) -> Iterator[Run]:
    """All fits that these questions of protocol.md need, in its order."""
    for seed in seeds if 1 in questions else ():  # what happens at my learning rate?
        for lr in suite.rates:
            for method in METHODS:
                yield Run(method.name, USUAL, lr, (), seed)
    for seed in seeds[:5] if 2 in questions else ():  # with my schedule, my length of run, my optimizer?
        for name, condition in suite.conditions.items():
            methods = condition.get("methods", [method.name for method in METHODS])
            for lr in condition["rates"]:  # type: ignore[attr-defined]
                for method in methods:  # type: ignore[attr-defined]
                    yield Run(method, name, lr, (), seed)
    for seed in seeds[:5] if 3 in questions else ():  # is the automatic rate as good as the best fixed one?
        for lr in suite.rates:
            for settings in FIXED_RATES:
                yield Run(TPGM, USUAL, lr, tuple(settings.items()), seed)
    for seed in seeds if 4 in questions else ():  # and if I tune everything?
        for lr in suite.rates:
            for method in METHODS:
                for settings in method.others:
                    yield Run(method.name, USUAL, lr, tuple(settings.items()), seed)
    for seed in seeds[:5] if 5 in questions else ():  # how often need radii be updated?
        for lr in suite.rates[-3:-1]:
            for settings in CADENCES:
                yield Run(TPGM, USUAL, lr, tuple(settings.items()), seed)
    if 6 in questions:  # would one of these ideas be better?
        yield from ideas(suite, seeds[:5], TRIED)
    for seed in seeds[:5] if 7 in questions else ():  # would another held-out loss be better?
        for lr in suite.rates:
            for settings in OTHER_LOSSES:
                yield Run(TPGM, USUAL, lr, tuple(settings.items()), seed)
    for seed in seeds[:5] if 8 in questions else ():  # do training data help the radii where few are held out?
        for lr in suite.rates:
            for settings in OTHER_DATA:
                yield Run(TPGM, USUAL, lr, tuple(settings.items()), seed)
    if 9 in questions:  # would one of the other ideas be better?
        yield from ideas(suite, seeds[:5], TRIED_LATER)
    for seed in seeds[:5] if 10 in questions else ():  # do training data help in turn, and where few are held out?
        for lr in suite.rates:
            yield Run(TPGM, USUAL, lr, tuple(IN_TURN_OR_HALF[0].items()), seed)
        for condition in (name for name in (COSINE, *FEW) if name in suite.conditions):
            for lr in suite.conditions[condition]["rates"]:  # type: ignore[attr-defined]
                for settings in IN_TURN_OR_HALF:
                    yield Run(TPGM, condition, lr, tuple(settings.items()), seed)


def ideas(suite: Suite, seeds: Sequence[int], tried: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Run]:
    """Methods with settings of their own at the second and third of the largest rates, constant and cosine."""
    for seed in seeds:
        for condition in (USUAL, *suite.conditions.keys() & {COSINE}):
            for lr in suite.rates[-3:-1]:
                for name, settings in tried:
                    yield Run(name, condition, lr, tuple(settings.items()), seed)


def work_quietly() -> None:
    """One thread, and no messages: what a process of the pool begins with."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def carry_out(suite: str, run: Run, epochs: int | None) -> list[Result]:
    """One fit in a process of the pool."""
    work_quietly()
    return Fit(load_suite(suite), run, epochs).carry_out()


def describe(suite: Suite, epochs: int | None) -> dict[str, object]:
    """What a reader needs to judge the results, or to make them again."""
    versions = {module.__name__: module.__version__ for module in (lightning_tpgm, lightning, torch)}
    return {
        "in_distribution": suite.in_distribution,
        "groups": suite.groups,
        "epochs": suite.epochs if epochs is None else epochs,
        "rates": suite.rates,
        "conditions": suite.conditions,
        "versions": {"python": platform.python_version(), **versions},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
    }


def benchmark(suite: Suite, folder: Path, pool: Any, runs: Iterable[Run], epochs: int | None = None) -> None:
    """Carry out those of these fits whose results are missing."""
    path = folder / f"{suite.name}.csv"
    done = {result.run for result in read(path)}
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(describe(suite, epochs), indent=2) + "\n")
    missing = [run for run in dict.fromkeys(runs) if run not in done]  # questions share some
    started = {pool.submit(carry_out, suite.name, run, epochs): run for run in missing}
    for future in as_completed(started):
        append(path, future.result())
        print(suite.name, started[future], flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--seeds", type=int, help="the first so many; default: all of the suite's")
    parser.add_argument("--questions", type=int, nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--epochs", type=int, help="instead of the suite's; needs --output")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.epochs is not None and arguments.output.resolve() == FOLDER.resolve():
        parser.error("--epochs needs an --output of its own: the committed results are those of the suites' epochs")
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        for suite in map(load_suite, arguments.suites):
            runs = plan(suite, range(suite.seeds)[: arguments.seeds], arguments.questions)
            benchmark(suite, arguments.output, pool, runs, arguments.epochs)


if __name__ == "__main__":
    main()
