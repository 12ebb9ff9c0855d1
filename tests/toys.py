"""A small module with every kind of tensor that is constrained, its data, and a loader that can be stopped anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 4


class Toy(pl.LightningModule):
    """Convolution, BatchNorm, LayerNorm, two linear layers and a scalar: images of shape (batch, 1, 4, 4) to 2 numbers.

    Args:
        optimizer: Makes the optimizer of the trainable parameters; None: SGD with momentum.
    """

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
        self.norm = nn.LayerNorm(12)
        self.hidden = nn.Linear(12, 5)
        self.head = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.optimizer = optimizer or sgd

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(torch.tanh(self.hidden(self.norm(self.backbone(x)))))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(p for p in self.parameters() if p.requires_grad)


def toy(seed: int = 0, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> Toy:
    """A `Toy` with weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Toy(optimizer)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def images(n: int, seed: int) -> TensorDataset:
    """Random images and targets."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 4, 4, generator=generator), torch.randn(n, 2, generator=generator))


def train_loader(batches: int = 6) -> DataLoader:
    return DataLoader(images(batches * BATCH_SIZE, seed=1), BATCH_SIZE)


def val_loader() -> DataLoader:
    """Three batches, the last one short."""
    return DataLoader(images(10, seed=2), BATCH_SIZE)


def quiet_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A trainer on the CPU that prints, logs and saves nothing unless told otherwise."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **(quiet | options))


class SaveOnException(Checkpoint):
    """Lightning's `OnExceptionCheckpoint` without what that does to later fits: it is its file's name that resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


class StatefulLoader:
    """A shuffling loader that can be resumed in mid-epoch; its order depends on the epoch alone.

    Args:
        dataset: What is loaded.
        in_flight: Says how many of the batches handed out are not trained on yet; they will be handed out again.
    """

    def __init__(self, dataset: TensorDataset, in_flight: Callable[[], int] = lambda: 0) -> None:
        self.dataset = dataset
        self.in_flight = in_flight
        self.sampler = self  # Lightning tells a loader's sampler which epoch it is
        self.position = 0  # batches handed out in this epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(epoch))

    def __len__(self) -> int:
        return len(self.dataset) // BATCH_SIZE

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.position %= len(self)
        while self.position < len(self):
            self.position += 1
            yield list(self.dataset[self.order[(self.position - 1) * BATCH_SIZE : self.position * BATCH_SIZE]])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position - self.in_flight()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
