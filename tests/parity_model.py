"""The small model of the recorded trajectories in tests/parity, and a reader for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

PARITY = Path(__file__).parent / "parity"
BATCH_SIZE = 16


class ParityModel(nn.Module):
    """Two convolutions, BatchNorm, LayerNorm and two linear layers: 1 x 8 x 8 images to 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (batch, 1, 8, 8) to logits of shape (batch, 4)."""
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.conv2(x)).mean(dim=(2, 3))
        return self.head(torch.tanh(self.fc(self.norm(x))))


@dataclass(frozen=True)
class Recording:
    """One recorded run; tests/parity/README.md says what each array holds."""

    names: list[str]
    radii: Tensor  # (steps, len(names))
    train_x: Tensor
    train_y: Tensor
    heldout_x: Tensor
    heldout_y: Tensor
    init: dict[str, Tensor]
    final: dict[str, Tensor]
    settings: dict[str, str | int | float | bool]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.radii)

    @property
    def anchors(self) -> dict[str, Tensor]:
        """Initial values of the constrained parameters."""
        return {name: self.init[name] for name in self.names}

    def train_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of every step, in order."""
        return zip(self.train_x.split(BATCH_SIZE), self.train_y.split(BATCH_SIZE), strict=True)

    def heldout_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out batches, in order, once."""
        return zip(self.heldout_x.split(BATCH_SIZE), self.heldout_y.split(BATCH_SIZE), strict=True)

    def model(self) -> ParityModel:
        """A fresh float32 model at the anchor, in train mode."""
        model = ParityModel()
        model.load_state_dict(self.init)
        return model


def load_recording(path: str | Path) -> Recording:
    """Read a recording from an .npz file; a relative path is taken from tests/parity."""
    with np.load(PARITY / path) as file:
        arrays = {key: file[key] for key in file.files}
    named = {"names", "radii", "tx", "ty", "vx", "vy"}

    def state(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}

    return Recording(
        names=[str(name) for name in arrays["names"]],
        radii=torch.from_numpy(arrays["radii"]),
        train_x=torch.from_numpy(arrays["tx"]),
        train_y=torch.from_numpy(arrays["ty"]),
        heldout_x=torch.from_numpy(arrays["vx"]),
        heldout_y=torch.from_numpy(arrays["vy"]),
        init=state("init/"),
        final=state("final/"),
        settings={key: value.item() for key, value in arrays.items() if key not in named and "/" not in key},
    )
