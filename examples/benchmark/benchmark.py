"""Compare robust fine-tuning methods on real models and real domain shift.

    python examples/benchmark/prepare.py                      # once: data and pretrained weights
    python examples/benchmark/benchmark.py                    # every suite and method
    python examples/benchmark/benchmark.py --suites digits    # one suite

Every setting of a method's grid is run with the first seeds, and the one with the highest mean accuracy on data in
distribution that were kept for it is run with all. Test data take no part in a choice. In this order: the learning rate
of the linear probe, that of plain fine-tuning (then used by all methods), the settings of each method.

Runs whose results are in the CSV files are not repeated, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

import lightning_tpgm
from cache import cached
from leads import LEADS
from lightning_tpgm import project_checkpoint, wise_ft_sweep
from lightning_tpgm.callbacks.radii import WithRadii
from methods import ELSEWHERE, FIXED, LINEAR_PROBE, LP_FT, METHODS, PLAIN, POST_HOC, PRETRAINED, WISE_FT, Method
from results import FOLDER, Result, Settings, append, choose, read
from suite import SUITES, Suite, load_suite

SEEDS = 5


@torch.inference_mode()
def accuracy(model: LightningModule, data: TensorDataset) -> float:
    """Share of right answers of `model`, in eval mode; in bfloat16, which is faster."""
    model.eval()
    inputs, labels = data.tensors
    with torch.autocast("cpu", torch.bfloat16):
        answers = torch.cat([model(batch).argmax(dim=1) for batch in inputs.split(100)])
    return (answers == labels).double().mean().item()


@dataclass(frozen=True)
class Run:
    """One fine-tuning run.

    Attributes:
        suite: Name of the suite.
        method: Name of the method.
        settings: The method's own, ``lr`` of the fine-tuning and ``probe_lr`` of the linear probe before it; where they
            are given ``momentum`` of SGD, instead of the suite's optimizer, ``again``: from the suite's second
            pretraining, ``held_out``, the share of the held-out data that is used, and ``free_head``: the head is not
            constrained.
        seed: Of the split, the order of the data, and the dropout.
        epochs: Of every fit.
    """

    suite: str
    method: str
    settings: Settings
    seed: int
    epochs: int

    def trainer(self, callbacks: Iterable[Callback] = ()) -> Trainer:
        """A trainer that writes nothing and validates once."""
        return Trainer(
            accelerator="cpu",
            precision=load_suite(self.suite).precision,
            max_epochs=self.epochs,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            check_val_every_n_epoch=self.epochs,
            num_sanity_val_steps=0,
        )

    def fit(self, model: LightningModule, callbacks: Iterable[Callback] = ()) -> LightningModule:
        """Fine-tune."""
        data = load_suite(self.suite).data(self.seed)
        held_out = round(self.settings.get("held_out", 1) * len(data.held_out))
        data.held_out = TensorDataset(*data.held_out[:held_out])
        self.trainer(callbacks).fit(model, datamodule=data)
        return model

    def pretrained(self, lr: float) -> LightningModule:
        """The pretrained module, and the random state of the seed."""
        seed_everything(self.seed, verbose=False)
        again = {"again": True} if self.settings.get("again") else {}
        return load_suite(self.suite).model(lr, **again)

    def probed(self) -> LightningModule:
        """The module after a linear probe: nothing but the head was trained."""
        model = self.pretrained(self.settings["probe_lr"])
        head = load_suite(self.suite).head
        frozen = [parameter for name, parameter in model.named_parameters() if not fnmatchcase(name, head)]
        trainable = [parameter for parameter in frozen if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        self.fit(model)
        for parameter in trainable:
            parameter.requires_grad_(True)
        return model

    def stored(self, name: str, make: Callable[[], LightningModule]) -> Path:
        """The state dict of a module that several runs need, made by the first of them."""
        path = cached("weights") / f"{self.suite}-{name}-seed{self.seed}-epochs{self.epochs}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            torch.save(make().state_dict(), unfinished)
            unfinished.rename(path)
        return path

    def start(self, probe: bool | None = None) -> LightningModule:
        """Where fine-tuning starts: the pretrained module, after a linear probe if the suite or the method asks."""
        probe = load_suite(self.suite).probe_first if probe is None else probe
        path = self.stored(f"probe-{self.settings['probe_lr']:g}", self.probed) if probe else None
        lr = self.settings.get("lr", 0.0)
        model = self.pretrained(lr)
        if path is not None:
            model.load_state_dict(torch.load(path, weights_only=True))
        if "momentum" in self.settings:
            sgd = torch.optim.SGD(model.parameters(), lr, self.settings["momentum"])
            model.configure_optimizers = lambda: sgd
        return model

    def plain(self) -> Path:
        """The state dict after plain fine-tuning."""
        rates = "{probe_lr:g}-{lr:g}".format_map(self.settings)
        rates += "".join(f"-{name}-{self.settings[name]:g}" for name in ("momentum", "again") if name in self.settings)
        return self.stored(f"plain-{rates}", lambda: self.fit(self.start()))

    def fine_tuned(self) -> LightningModule:
        """The module after plain fine-tuning."""
        path = self.plain()
        model = self.start()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def wise_ft(self, alpha: float) -> LightningModule:
        """Interpolate between the start and plain fine-tuning."""
        model = self.fine_tuned()
        data = load_suite(self.suite).data(self.seed)
        wise_ft_sweep(self.trainer(), model, self.start(), "val_loss", alphas=[alpha], datamodule=data)
        return model

    def after_the_fact(self, radius_steps: int) -> LightningModule:
        """TPGM between the start and plain fine-tuning."""
        model = self.start()
        pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        held_out = DataLoader(load_suite(self.suite).data(self.seed).held_out, batch_size=64, shuffle=True)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "projected.pt"
            project_checkpoint(
                model, pretrained, self.plain(), held_out, output, radius_steps=radius_steps, trainer=self.trainer()
            )
        return model

    def carry_out(self) -> Result:
        """Make the module and score it on the held-out data and every test domain."""
        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        started = time.perf_counter()
        shared = ("lr", "probe_lr", "momentum", "again", "held_out", "free_head")
        own = {name: value for name, value in self.settings.items() if name not in shared}
        if self.settings.get("free_head"):
            own["exclude"] = [load_suite(self.suite).head]
        radii: list[tuple[str, float, float]] = []
        if self.method == PRETRAINED.name:
            model = self.start()
        elif self.method == LINEAR_PROBE.name:
            model = self.start(probe=True)
        elif self.method == LP_FT.name:
            model = self.fit(self.start(probe=True))
        elif self.method == PLAIN.name:
            model = self.fine_tuned()
        elif self.method == WISE_FT.name:
            model = self.wise_ft(**own)
        elif self.method == POST_HOC.name:
            model = self.after_the_fact(**own)
        else:
            (make,) = (method.callback for method in (*METHODS, *LEADS) if method.name == self.method)
            callback = make(**own)
            model = self.fit(self.start(), [callback])
            if isinstance(callback, WithRadii):
                radii = [(name, radius, callback.distances[name]) for name, radius in callback.radii.items()]
        seconds = time.perf_counter() - started
        suite = load_suite(self.suite)
        data = suite.data(self.seed)
        choice = accuracy(model, data.choice)
        accuracies = {domain: accuracy(model, data.domains[domain]) for domain in suite.domains}
        return Result(self.method, self.settings, self.seed, choice, accuracies, seconds, radii)


class Benchmark:
    """Runs what is missing of one suite.

    Args:
        suite: The suite.
        folder: Where its results are.
        pool: Carries out runs.
        seeds: Number of seeds.
        epochs: Of every fit; None: as many as the suite says.
    """

    def __init__(
        self, suite: Suite, folder: Path, pool: ProcessPoolExecutor, seeds: int = SEEDS, epochs: int | None = None
    ) -> None:
        self.suite = suite
        self.path = folder / f"{suite.name}.csv"
        self.pool = pool
        self.seeds = range(seeds)
        self.epochs = epochs or suite.epochs
        self.results = read(self.path)
        self._check_same_kind()
        self.chosen: dict[str, Settings] = {}

    def _check_same_kind(self) -> None:
        """Refuse to mix results of different lengths of training, or to describe more seeds as fewer."""
        description = self.path.with_suffix(".json")
        if description.exists():
            found = json.loads(description.read_text())
            if found["epochs"] != self.epochs or len(found["seeds"]) > len(self.seeds):
                raise SystemExit(
                    f"{self.path} holds results with {found['epochs']} epochs and {len(found['seeds'])} seeds, asked"
                    f" for are {self.epochs} and {len(self.seeds)}: choose another --output."
                )

    def carry_out(self, runs: Iterable[tuple[str, Settings, int]]) -> None:
        """Carry out these runs (method, settings, seed), less those whose results are there."""
        done = [(result.method, result.settings, result.seed) for result in self.results]
        missing = [Run(self.suite.name, *run, self.epochs) for run in runs if run not in done]
        for future in as_completed([self.pool.submit(run.carry_out) for run in missing]):
            result = future.result()
            append(self.path, result)
            self.results.append(result)
            print(f"{self.suite.name}: {result.method} {dict(result.settings)} seed {result.seed}", flush=True)

    def compare(self, grids: dict[str, list[Settings]]) -> None:
        """Run every setting of these methods with the selection seeds, and the best of each with all seeds."""
        few = self.seeds[: self.suite.selection_seeds]
        self.carry_out((name, settings, seed) for seed in few for name, grid in grids.items() for settings in grid)
        curve = grids.get(WISE_FT.name, [])  # all of it, for the figure: it needs no training
        self.carry_out((WISE_FT.name, settings, seed) for seed in self.seeds for settings in curve)
        best = {name: choose(self.results, name, grid, few) for name, grid in grids.items()}
        self.carry_out((name, settings, seed) for seed in self.seeds for name, settings in best.items())
        self.chosen |= best

    def grids(self, methods: Iterable[Method]) -> dict[str, list[Settings]]:
        """The grids of methods that follow the learning rates, with the rates that were chosen."""
        first = (LINEAR_PROBE.name, PLAIN.name)
        rates = self.chosen[PLAIN.name]
        return {m.name: [{**rates, **settings} for settings in m.grid] for m in methods if m.name not in first}

    def run(self, methods: Sequence[Method] = METHODS) -> None:
        """First the learning rates, then everything else; at last look for results of methods that were run before."""
        probes = next((m for m in methods if m.name == LINEAR_PROBE.name), LINEAR_PROBE).grid
        self.compare({LINEAR_PROBE.name: [dict(settings) for settings in probes]})
        probed = self.chosen[LINEAR_PROBE.name]
        self.compare({PLAIN.name: [{**probed, "lr": lr} for lr in self.suite.learning_rates]})
        self.carry_out((PLAIN.name, {**probed, "lr": lr}, seed) for lr in self.suite.also for seed in self.seeds)
        self.compare(self.grids(methods))
        rates, names = self.chosen[PLAIN.name], [method.name for method in methods]
        fixed = [(each.method, {**rates, **each.settings}) for each in FIXED if each.method in names]
        self.carry_out((*each, seed) for seed in self.seeds for each in fixed)
        elsewhere = [
            (method.name, {**rates, **condition, **settings})
            for condition in self.suite.elsewhere.values()
            for method in ELSEWHERE
            for settings in method.grid
            if method.name in names
        ]
        self.carry_out((*each, seed) for seed in self.seeds for each in elsewhere)
        for name, grid in self.grids((*METHODS, *LEADS)).items():
            with suppress(LookupError):
                self.chosen[name] = choose(self.results, name, grid, self.seeds[: self.suite.selection_seeds])

    def describe(self) -> dict[str, object]:
        """What a reader needs to judge the results, or to make them again."""
        versions = {module.__name__: module.__version__ for module in (lightning_tpgm, lightning, torch)}
        return {
            "in_distribution": self.suite.in_distribution,
            "groups": self.suite.groups,
            "seeds": list(self.seeds),
            "selection_seeds": list(self.seeds[: self.suite.selection_seeds]),
            "epochs": self.epochs,
            "learning_rates": self.suite.learning_rates,
            "elsewhere": self.suite.elsewhere,
            "grids": {method.name: method.grid for method in (*METHODS, *LEADS) if method.name in self.chosen},
            "chosen": self.chosen,
            "rule": "highest mean accuracy on the choice data, over the selection seeds; among equals the first",
            "versions": {"python": platform.python_version(), **versions},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
        }


def main() -> None:
    """Run the suites, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="epochs of every fit (default: the suite's)")
    parser.add_argument("--first", action="store_true", help="try only the first setting of each method")
    names = [method.name for method in (*METHODS, *LEADS)]
    parser.add_argument("--methods", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args()
    asked = arguments.methods or [method.name for method in METHODS]
    methods = [method for method in (*METHODS, *LEADS) if method.name in asked]
    arguments.output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for name in arguments.suites:
            benchmark = Benchmark(load_suite(name), arguments.output, pool, arguments.seeds, arguments.epochs)
            benchmark.run([method.first() for method in methods] if arguments.first else methods)
            (arguments.output / f"{name}.json").write_text(json.dumps(benchmark.describe(), indent=2) + "\n")


if __name__ == "__main__":
    main()
