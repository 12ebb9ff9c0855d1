"""What the constraint costs: time of each method's own work in a step, against the floor, and memory.

Everything is timed in one process and in alternating rounds, so that what else the machine does falls on all alike.
Timed are a plain training step, the evaluation that TPGM cannot do without, and a copy of the weights. So are each
method, and naive transcriptions of TPGM and FTP in both norms. Under an hour on two cores; `--quick`: some minutes.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tpgm import DiGraPCallback, FTPCallback, L2SPCallback, SPDCallback, TPGMCallback
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.constraint import Constraint
from lightning_tpgm.methods import TPGM, Step
from models import CLASSES, MODELS, Tiny, growing
from naive import NaiveFTP, NaiveTPGM

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 32)
LEAST = 3  # rounds: the median of fewer is none


class HeldOut:
    """Always the same batch: loading is not what is measured."""

    batch: Any = None

    def __iter__(self) -> Iterator[Any]:
        """One batch a pass."""
        yield HeldOut.batch


METHODS: dict[str, Callable[[], MethodCallback]] = {
    "TPGM, mars": lambda: TPGMCallback(HeldOut(), every_n_steps=1, norm="mars"),
    "TPGM, l2": lambda: TPGMCallback(HeldOut(), every_n_steps=1, norm="l2"),
    "FTP, mars": FTPCallback,
    "FTP, l2": lambda: FTPCallback(norm="l2"),
    "DiGraP": DiGraPCallback,
    "SPD": SPDCallback,
    "L2-SP": L2SPCallback,
}


class Module(pl.LightningModule):
    """An ordinary classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The cross entropy."""
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What most use."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(pl.Callback):
    """Times everything in turn at the end of the first batch of a fit.

    Args:
        methods: Those that are timed.
        rounds: How often.
        seconds: No further round starts later than this, once there are three.
        warm_up: Rounds before them that are not counted.
        peer: Whether the naive transcriptions are timed, too.
    """

    def __init__(self, methods: list[str], rounds: int, seconds: float, peer: bool, warm_up: int = 1) -> None:
        self.methods, self.rounds, self.seconds, self.peer, self.warm_up = methods, rounds, seconds, peer, warm_up
        self.times: dict[str, list[float]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Does it."""
        HeldOut.batch = batch
        (optimizer,) = trainer.optimizers
        parameters = list(pl_module.parameters())
        callbacks = {name: METHODS[name]() for name in self.methods}
        step = Step(optimizer, 0)
        constraints: dict[str, Constraint] = {}
        for name, callback in callbacks.items():
            callback.setup(trainer, pl_module, "fit")
            callback.on_train_start(trainer, pl_module)
            constraints[name] = callback._constraint  # its steps are taken by hand, not by the optimizer
            constraints[name].steps.stop()
        peers: dict[str, tuple[str, Callable[[], None]]] = {}  # of each method: what it is called, and a step of it
        for norm, more in {"mars": "", "l2": ", l2"}.items() if self.peer else ():
            tpgm = partial(NaiveTPGM(pl_module, norm), pl_module, batch)
            peers[f"TPGM, {norm}"] = f"naive{more}", tpgm
            peers[f"FTP, {norm}"] = f"naive FTP{more}", NaiveFTP(optimizer, norm).after
        weights, copy = ([p.detach().clone() for p in parameters] for _ in range(2))

        def plain() -> None:
            optimizer.zero_grad()
            pl_module.training_step(batch).backward()
            optimizer.step()

        def evaluation() -> None:
            pl_module.eval()
            torch.autograd.grad(pl_module.training_step(batch), parameters)
            pl_module.train()

        def before(constraint: Constraint) -> None:
            constraint.before(step)
            constraint.change_gradients(step)

        def projection(constraint: Constraint) -> None:
            tensors = constraint.tensors
            constraint.method._constrain(tensors, range(0), tensors.vector([True for _ in tensors.names]))

        end = time.perf_counter() + self.seconds
        for round_ in range(-self.warm_up, self.rounds):
            if round_ >= LEAST and time.perf_counter() > end:
                break
            times = {"plain step": [seconds(plain)]}  # its gradients serve all methods
            with torch.no_grad():
                times["copy"] = [seconds(lambda: torch._foreach_copy_(copy, weights))]
            for name, constraint in constraints.items():
                is_tpgm = isinstance(constraint.method, TPGM)
                if is_tpgm:  # machines have fast and slow moments: both in the same one
                    times.setdefault("evaluation", []).append(seconds(evaluation))
                with torch.no_grad():
                    own = seconds(before, constraint)
                    optimizer.step()
                    times[name] = [own + seconds(constraint.after, step)]
                    if is_tpgm:
                        optimizer.step()
                        times[f"{name}: projection"] = [seconds(projection, constraint)]
                if name in peers:
                    peer, call = peers[name]
                    optimizer.step()
                    times[peer] = [seconds(call)]
            if round_ >= 0:
                for name, values in times.items():
                    self.times.setdefault(name, []).extend(values)


def seconds(function: Callable[..., object], *args: object) -> float:
    """How long a call takes, a GPU's work included."""
    gc.collect()
    _synchronize()
    start = time.perf_counter()
    function(*args)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fit(model: nn.Module, data: Tensor, callbacks: list[pl.Callback], steps: int = 1) -> None:
    """Train for some steps."""
    batch = [data, torch.randint(CLASSES, (len(data),))]
    trainer = pl.Trainer(
        max_steps=steps,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(model), DataLoader([batch] * steps, batch_size=None))


def timed(model: nn.Module, data: Tensor, **options: Any) -> dict[str, tuple[float, int]]:
    """Median seconds and number of measurements of everything."""
    clock = Clock(**options)
    torch.manual_seed(0)
    fit(model, data, [clock])
    return {name: (median(values), len(values)) for name, values in clock.times.items()}


def peak_memory(model: str, method: str) -> int:
    """Bytes at the peak of a fit of four steps at batch size 1, in a process of its own."""
    command = [sys.executable, __file__, "--peak-memory", model, method]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def print_peak_memory(model: str, method: str) -> None:
    """The other end of `peak_memory`."""
    make, data = MODELS[model]
    callbacks = [METHODS[method]()] if method in METHODS else []
    batch = data(1)
    HeldOut.batch = [batch, torch.randint(CLASSES, (1,))]
    fit(make(), batch, list(callbacks), steps=4)
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        # not getrusage: what it says begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024)


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def done(path: Path) -> set[tuple[str, str]]:
    """The models and batch sizes (or methods) that a file has results of."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["model"], row.get("batch") or row["method"]) for row in csv.DictReader(file)}


def describe() -> dict[str, Any]:
    """Versions and machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="few rounds and small batches")
    parser.add_argument("--peak-memory", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.peak_memory:
        print_peak_memory(*arguments.peak_memory)
        return
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    (output / "machine.json").write_text(json.dumps(describe(), indent=2) + "\n")
    rounds, limit = (1, 0.0) if arguments.quick else (9, 200.0)

    times = output / "times.csv"
    for batch in BATCHES[: 1 if arguments.quick else None]:
        for name, (make, data) in MODELS.items():
            if (name, str(batch)) in done(times):
                continue
            print(name, batch, flush=True)
            model = make()
            size = {"parameters": sum(p.numel() for p in model.parameters()), "tensors": len(list(model.parameters()))}
            large = batch >= 32  # up to some minutes a round
            options = {"methods": list(METHODS), "rounds": rounds, "seconds": limit / 4 if large else limit}
            found = timed(model, data(batch), **options, peer=True)
            key = {"model": name, "batch": batch, **size}
            append(times, [key | {"what": w, "seconds": f"{s:.6g}", "rounds": n} for w, (s, n) in found.items()])

    growth = output / "growth.csv"
    for count, elements in growing(small=arguments.quick):
        name = f"{count} x {elements // count}"
        if (name, "1") in done(growth):
            continue
        print(name, flush=True)
        methods = ["TPGM, mars", "TPGM, l2"]
        found = timed(
            Tiny(count, elements), torch.ones(1, 3, 1, 1), methods=methods, rounds=5, seconds=20.0, peer=False
        )
        key = {"model": name, "batch": 1, "parameters": elements, "tensors": count}
        append(growth, [key | {"what": w, "seconds": f"{s:.6g}", "rounds": n} for w, (s, n) in found.items()])

    memory = output / "memory.csv"
    for name in list(MODELS)[: 1 if arguments.quick else 3]:
        for method in ("plain", *METHODS):
            if (name, method) not in done(memory):
                print(name, method, flush=True)
                append(memory, [{"model": name, "method": method, "peak_bytes": peak_memory(name, method)}])


if __name__ == "__main__":
    main()
