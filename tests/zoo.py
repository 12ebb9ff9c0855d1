"""Small modules, data and a quiet Trainer that the tests share."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

FEATURES, CLASSES = 6, 3


def quiet_trainer(tmp_path: Path, **kwargs: Any) -> pl.Trainer:
    """One epoch on one CPU process; neither bar nor logger nor checkpoints unless asked for."""
    settings: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**settings, **kwargs})


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and python, without the environment variable that Lightning's function leaves behind."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


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


def row_distances(weight: Tensor, anchor: Tensor, norm: str) -> Tensor:
    """The distance of every row, in float64; written without the package."""
    deviation = weight.double() - anchor.double()
    if norm == "l2" or deviation.dim() < 2:
        deviation = deviation.reshape(1, -1)
    deviation = deviation.flatten(1)
    return deviation.abs().sum(1) if norm == "mars" else deviation.square().sum(1).sqrt()


def assert_inside_balls(
    module: nn.Module, anchors: Mapping[str, Tensor], radii: Mapping[str, float], norm: str = "mars", rtol: float = 1e-5
) -> None:
    """Every tensor is no farther from its anchor than its radius; storing a weight rounds it.

    One whose radius is not a number has not been stepped yet, and so has not moved.
    """
    parameters = dict(module.named_parameters())
    assert radii
    for name, radius in radii.items():
        weight = parameters[name].detach()
        distance = row_distances(weight, anchors[name], norm)
        rounding = torch.finfo(weight.dtype).eps * row_distances(weight, torch.zeros_like(weight), norm)
        bound = 0.0 if radius != radius else radius
        assert (distance <= bound * (1 + rtol) + rounding).all(), f"{name}: distances {distance}, radius {radius}"


def assert_identical(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the bit, tensors and arrays at any depth of mappings and sequences included."""
    assert type(found) is type(expected), f"{where}: {type(found)} is not {type(expected)}"
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, err_msg=where)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for key in expected:
            assert_identical(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), f"{where}: {len(found)} entries are not {len(expected)}"
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_identical(one, other, f"{where}[{i}]")
    else:
        assert found == expected or (found != found and expected != expected), f"{where}: {found!r} is not {expected!r}"
