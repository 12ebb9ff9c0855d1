"""What tests train: `Toy`, with every kind of tensor that is constrained, on images; `Classifier`, on points.

Also their data, quiet trainers, and a loader that can be stopped anywhere.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

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


class Sharp(torch.optim.SGD):
    """Calls its closure at weights beside its own, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        own = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, 0.5)
        loss = closure()
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)
        super().step()
        return loss


class ByHand(Toy):
    """Manual optimization, with a closure."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()

        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))

        optimizer.step(closure=closure)


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


def trainer_in(folder: Path, **settings: Any) -> pl.Trainer:
    """A quiet trainer whose files, if any are asked for, are in a folder, and whose logs are due at every step."""
    callbacks = settings.pop("callbacks", None) or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return quiet_trainer(*callbacks, **{"default_root_dir": folder, "devices": 1, "log_every_n_steps": 1, **settings})


# --- points to classify

FEATURES, CLASSES = 6, 3


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and python, without the environment variable that Lightning's function leaves behind."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def leave_group() -> None:
    """Ends a process of a group, without the usual end: what is still there of gloo's threads may abort it there."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def blobs(count: int, seed: int = 0) -> TensorDataset:
    """Clouds of points, one a class, in turn: a linear module learns them."""
    y = torch.arange(count) % CLASSES
    noise = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(2 * torch.eye(CLASSES, FEATURES)[y] + noise, y)


class Blobs(pl.LightningDataModule):
    """Training and validation points, in a fixed order: 4 and 2 batches."""

    def __init__(self, train: int = 32, val: int = 16, batch_size: int = 8) -> None:
        super().__init__()
        self.train, self.val, self.batch_size = blobs(train, seed=1), blobs(val, seed=2), batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=self.batch_size)


class Classifier(pl.LightningModule):
    """A backbone and a head with always the same initial weights, trained with SGD."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh())
            self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def classifier_loss(pl_module: Classifier, batch: Any) -> Tensor:
    """A `loss` callable for `Classifier`."""
    return pl_module.loss(batch)


class Counted(Dataset[Any]):
    """A data set that counts how many of its items were asked for."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset, self.count = dataset, 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        return self.dataset[index]


class AfterEachStep(pl.Callback):
    """Calls a function (trainer, pl_module) after every step of every optimizer, after the callbacks listed before."""

    def __init__(self, function: Callable[[pl.Trainer, pl.LightningModule], None]) -> None:
        self.function = function

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.function(trainer, pl_module))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
