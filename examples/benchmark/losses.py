"""Loss and accuracy in distribution: is TPGM worse there at small learning rates, or only less accurate?

Radii are learned from the held-out loss, and tables of accuracy do not show that. Fits whose results are in
results/losses.csv are not repeated.

    python examples/benchmark/losses.py --suites digits emoji
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch.utils.data import TensorDataset

from benchmark import USUAL, Fit
from methods import FTP, PLAIN, TPGM
from results import FOLDER, Run
from suite import SUITES, load_suite

COMPARED = (PLAIN, FTP, TPGM)
RATES = 2  # the smallest so many of each suite
SEEDS = 5
PATH = FOLDER / "losses.csv"


@torch.inference_mode()
def loss_and_accuracy(model: LightningModule, data: TensorDataset) -> tuple[float, float]:
    """Cross entropy and share of right answers of a classifier, in eval mode."""
    model.eval()
    inputs, labels = data.tensors
    logits = torch.cat([model(batch) for batch in inputs.split(100)])
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).double().mean().item()


def carry_out(suite: str, method: str, lr: float, seed: int) -> dict[str, str]:
    """One fit, and what it is worth on the test data in distribution."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    fit = Fit(load_suite(suite), Run(method, USUAL, lr, (), seed))
    fit.train()
    loss, accuracy = loss_and_accuracy(fit.model, fit.data.domains[fit.suite.in_distribution])
    key = {"suite": suite, "method": method, "lr": f"{lr:g}", "seed": str(seed)}
    return {**key, "loss": f"{loss:.4f}", "accuracy": f"{accuracy:.4f}"}


def read(path: Path = PATH) -> list[dict[str, str]]:
    """All rows; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Carry out what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=("digits", "emoji"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    done = {(row["suite"], row["method"], row["lr"], row["seed"]) for row in read()}
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(carry_out, suite.name, method, lr, seed)
            for suite in map(load_suite, arguments.suites)
            for seed in range(SEEDS)
            for lr in suite.rates[:RATES]
            for method in COMPARED
            if (suite.name, method, f"{lr:g}", str(seed)) not in done
        ]
        for job in as_completed(jobs):
            row = job.result()
            new = not PATH.exists()
            with PATH.open("a", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
