"""Loss and accuracy in distribution: is TPGM worse there at small learning rates, or only less accurate?

Radii are learned from the held-out loss, and tables of accuracy do not show that. Fits whose results are in
results/losses.csv are not repeated.

    python examples/benchmark/losses.py --suites digits emoji
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch.utils.data import TensorDataset

from benchmark import Fit, logits, share_right, work_quietly
from methods import FTP, PLAIN, TPGM
from results import FOLDER, Run, append_row, read_rows
from suite import SUITES, USUAL, load_suite

COMPARED = (PLAIN, FTP, TPGM)
RATES = 2  # the smallest so many of each suite
SEEDS = 5
NAME = "losses.csv"
PATH = FOLDER / NAME


def loss_and_accuracy(model: LightningModule, data: TensorDataset) -> tuple[float, float]:
    """Cross entropy and share of right answers of a classifier, in eval mode."""
    answers = logits(model, data)
    return F.cross_entropy(answers, data.tensors[1]).item(), share_right(answers, data)


def carry_out(suite: str, method: str, lr: float, seed: int) -> dict[str, str]:
    """One fit, and what it is worth on the test data in distribution."""
    work_quietly()
    fit = Fit(load_suite(suite), Run(method, USUAL, lr, (), seed))
    fit.train()
    loss, accuracy = loss_and_accuracy(fit.model, fit.data.domains[fit.suite.in_distribution])
    key = {"suite": suite, "method": method, "lr": f"{lr:g}", "seed": str(seed)}
    return {**key, "loss": f"{loss:.4f}", "accuracy": f"{accuracy:.4f}"}


def main() -> None:
    """Carry out what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=("digits", "emoji"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    done = {(row["suite"], row["method"], row["lr"], row["seed"]) for row in read_rows(PATH)}
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
            append_row(PATH, job.result())


if __name__ == "__main__":
    main()
