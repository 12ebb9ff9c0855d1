"""A project that is driven by a configuration file: the callback is added there, and the code knows nothing of it.

The callback's arguments are under `trainer.callbacks` in tpgm.yaml, the held-out loader by its import path; the second
line explains them. About fifteen seconds on two cores, in this folder:

    python main.py fit --config tpgm.yaml
    python main.py fit --trainer.callbacks.help=lightning_tpgm.TPGMCallback
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader, Subset

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "digits"))

from data import Digits  # noqa: E402
from model import DigitClassifier  # noqa: E402


def held_out() -> DataLoader[tuple[Tensor, ...]]:
    """What the radii are learned on: half of the digits that are held out."""
    digits = Digits()
    digits.setup("fit")
    return DataLoader(Subset(digits.held_out, range(0, 100, 2)), batch_size=50, shuffle=True)


if __name__ == "__main__":
    LightningCLI(DigitClassifier, Digits, seed_everything_default=0)
