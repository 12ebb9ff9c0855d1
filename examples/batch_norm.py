"""What freezing BatchNorm's running statistics does: plain fine-tuning and TPGM on digits, with and without.

    python examples/batch_norm.py

prints a Markdown table, in about three minutes on two cores. In distribution: 797 test digits of scikit-learn.
Shifted: the mean over 2,000 MNIST digits, which the network was pretrained on, as they are and under six shifts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parent / "digits"))
from data import Digits, shifted_domains
from experiment import evaluate, fine_tune, mean_accuracy, quieten_lightning
from lightning_tpgm import FreezeBatchNorm, TPGMCallback


def shown(accuracies: list[float]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    spread = f" ± {100 * stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{100 * fmean(accuracies):.1f}{spread}"


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="the first so many (default: %(default)s)")
    seeds = range(parser.parse_args().seeds)
    quieten_lightning()
    domains = shifted_domains()
    print(f"| {len(seeds)} seeds | BatchNorm's statistics | in distribution | shifted |")
    print("|---|---|---|---|")
    for name, methods in (("plain", []), ("TPGM", [TPGMCallback])):
        for state, freezers in (("move", []), ("frozen by `FreezeBatchNorm()`", [FreezeBatchNorm])):
            scores = []
            for seed in seeds:
                digits = Digits(seed)
                callbacks = [make() for make in (*freezers, *methods)]
                model, _ = fine_tune(digits, callbacks, freeze_statistics=False)
                scores.append((evaluate(model, digits.test).accuracy, mean_accuracy(model, domains)))
            inside, outside = map(list, zip(*scores, strict=True))
            print(f"| {name} | {state} | {shown(inside)} | {shown(outside)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
