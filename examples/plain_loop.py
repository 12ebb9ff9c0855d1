"""TPGM in a plain PyTorch loop: a network that knows MNIST learns other digits and keeps what it knew. No Lightning.

``python examples/plain_loop.py``; about 20 seconds on two cores.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import constrain
from lightning_tpgm.methods import TPGM

ASSETS = Path(__file__).parent / "digits" / "assets"


class Classifier(nn.Module):
    """The network of examples/digits, pretrained on MNIST. In eval mode throughout: BatchNorm keeps its statistics."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 32, 2), (32, 64, 2), (64, 96, 1), (96, 128, 2)]
        blocks = [(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in sizes]
        self.features = nn.Sequential(*(nn.Sequential(*block) for block in blocks))
        self.head = nn.Linear(128, 10)
        self.load_state_dict(torch.load(ASSETS / "mnist_cnn.pt", weights_only=True))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 1, 28, 28) to logits (batch, 10)."""
        return self.head(self.features(images).mean(dim=(2, 3)))


def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Scikit-learn's digits in the format of MNIST, 400 to train on and 100 held out, and MNIST's own test images."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = pad(interpolate(images.float().view(-1, 1, 8, 8) / 16, size=20, mode="bilinear"), (4, 4, 4, 4))
    with np.load(ASSETS / "mnist_test_2000.npz") as mnist:
        old = TensorDataset(torch.tensor(mnist["images"] / np.float32(255))[:, None], torch.tensor(mnist["labels"]))
    return TensorDataset(images[:400], labels[:400]), TensorDataset(images[400:500], labels[400:500]), old


def fine_tune(robust: bool, epochs: int = 10) -> tuple[float, float]:
    """Accuracy on the held-out digits and on inverted MNIST, after fine-tuning."""
    torch.manual_seed(0)
    train, held_out, old = digits()
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    if robust:  # all that is new in this loop
        batches = cycle(DataLoader(held_out, batch_size=50))

        def held_out_loss() -> Tensor:
            images, labels = next(batches)
            return cross_entropy(model(images), labels)

        constrain(model, TPGM(), optimizer, held_out_loss=held_out_loss)
    for _ in range(epochs):
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    inverted = TensorDataset(1 - old.tensors[0], old.tensors[1])
    return accuracy(model, held_out), accuracy(model, inverted)


@torch.inference_mode()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """The share of right answers."""
    images, labels = data.tensors
    return (model(images).argmax(dim=1) == labels).double().mean().item()


if __name__ == "__main__":
    for name, robust in (("plain fine-tuning", False), ("with TPGM", True)):
        new, old = fine_tune(robust)
        print(f"{name}: new digits {new:.1%}, what it knew before {old:.1%}")
