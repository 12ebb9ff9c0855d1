"""The digits suite: the setting of examples/digits."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from methods import FTP, PLAIN, TPGM
from suite import Data, Suite

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from data import CHECKPOINT, shifted_domains, sklearn_digits
from model import DigitClassifier


@cache
def data_sets() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    """1,000 of scikit-learn's digits to fine-tune on; the other 797, and MNIST under shifts, to test on."""
    images, labels = sklearn_digits().tensors
    test, pool = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split([797, 1000])
    domains = {"digits": TensorDataset(images[test], labels[test]), **shifted_domains()}
    return TensorDataset(images[pool], labels[pool]), domains


SUITE = Suite(
    name="digits",
    data=lambda seed: Data(*data_sets(), seed, train=400, held_out=100, choice=400),
    model=lambda seed, lr: DigitClassifier(lr, str(CHECKPOINT), freeze_statistics=True),
    rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    epochs=20,
    in_distribution="digits",
    groups={"shifted": ("clean", "rotated", "noisy", "blurred", "inverted", "low contrast", "shifted")},
    conditions={
        "cosine": {"schedule": "cosine", "rates": (1e-3, 3e-3)},
        "one-cycle": {"schedule": "one-cycle", "rates": (1e-3, 3e-3)},
        "a quarter of the steps": {"length": 0.25, "rates": (1e-3, 3e-3)},
        "four times the steps": {"length": 4.0, "rates": (1e-3, 3e-3)},
        "SGD": {"momentum": 0.9, "rates": (1e-2, 1e-1)},
        "steps": {"schedule": "steps", "rates": (1e-3, 3e-3), "methods": (PLAIN, FTP, TPGM)},
        "batches of 8": {"batch": 8, "rates": (1e-3, 3e-3), "methods": (PLAIN, FTP, TPGM)},
        "batches of 128": {"batch": 128, "rates": (1e-3, 3e-3), "methods": (PLAIN, FTP, TPGM)},
        "bf16-mixed": {"precision": "bf16-mixed", "rates": (1e-3, 3e-3), "methods": (PLAIN, FTP, TPGM)},
        "half the held-out batch": {"held_out_batch": 25, "rates": (1e-3, 3e-3), "methods": (PLAIN, TPGM)},
        "25 held out": {"held_out": 25, "rates": (1e-3, 3e-3), "methods": (PLAIN, TPGM)},
        "400 held out": {"held_out": 400, "rates": (1e-3, 3e-3), "methods": (PLAIN, TPGM)},
    },
    seeds=10,
)
