"""The data of the digits example: scikit-learn's digits to fine-tune on, MNIST under shifts to look back at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from shifts import add_noise, blur, invert, lower_contrast, move

ASSETS = Path(__file__).parent / "assets"
CHECKPOINT = ASSETS / "mnist_cnn.pt"
MNIST_IMAGES = ASSETS / "mnist_test_2000.npz"


def as_images(values: NDArray[np.uint8]) -> Tensor:
    """Turn bytes (count, 28, 28) into images (count, 1, 28, 28) with values in [0, 1]."""
    return torch.from_numpy(values.astype(np.float32) / 255).unsqueeze(1)


def sklearn_digits() -> TensorDataset:
    """The 1,797 digits of scikit-learn, enlarged from 8x8 to 20x20 pixels within 28x28 like those of MNIST."""
    values, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(values.astype(np.float32) / 16).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    return TensorDataset(F.pad(images, (4, 4, 4, 4)), torch.from_numpy(labels.astype(np.int64)))


class Digits(LightningDataModule):
    """The digits of scikit-learn, a small target domain of 400 training images.

    A fixed set of 797 digits is for testing, the same for every seed. So nothing chosen with one seed has seen the test
    digits of another. The other 1,000 are split anew by the seed. 400 are for training, 100 are held out (the
    validation set), and 100 are for choosing settings. No loader serves these (`choice`), and choose.py alone looks at
    them. 400 are left unused, which keeps the task small.

    Args:
        seed: Decides the split and the order of the training digits.
        batch_size: Size of a training batch.
    """

    def __init__(self, seed: int = 0, batch_size: int = 32) -> None:
        super().__init__()
        self.seed = seed
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Split the digits."""
        images, labels = sklearn_digits().tensors
        mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        test, pool = mixed[:797], mixed[797:]
        pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(self.seed))]
        self.train = TensorDataset(images[pool[:400]], labels[pool[:400]])
        self.held_out = TensorDataset(images[pool[400:500]], labels[pool[400:500]])
        self.choice = TensorDataset(images[pool[500:600]], labels[pool[500:600]])
        self.test = TensorDataset(images[test], labels[test])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """400 digits, shuffled."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """100 held-out digits."""
        return DataLoader(self.held_out, batch_size=50)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """797 test digits, the same for every seed."""
        return DataLoader(self.test, batch_size=200)


def shifted_domains() -> dict[str, TensorDataset]:
    """2,000 MNIST test images as they are and under six shifts, by name; the same on every call.

    The pretraining saw images like these, and the fine-tuning does not: accuracy here measures what was forgotten.
    """
    with np.load(MNIST_IMAGES) as file:
        images, labels = as_images(file["images"]), torch.from_numpy(file["labels"].astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    directions = torch.randint(0, 2, (len(images), 2), generator=generator) * 2 - 1
    domains = {
        "clean": images,
        "rotated": move(images, degrees=30),
        "noisy": add_noise(images, 0.3, generator),
        "blurred": blur(images, sigma=1.5),
        "inverted": invert(images),
        "low contrast": lower_contrast(images, 0.3),
        "shifted": move(images, offsets=4.0 * directions),
    }
    return {name: TensorDataset(domain, labels) for name, domain in domains.items()}
