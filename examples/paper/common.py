"""What both experiments share: the module, a fit that can be interrupted, the tests, and the table."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from domains import Domain, check_classes
from images import Images, Item, View
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


def only(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Logits (batch, classes) that are minus infinity for all classes but these."""
    kept = torch.full_like(logits, -math.inf)
    kept[:, classes] = logits[:, classes]
    return kept


class Classifier(LightningModule):
    """An encoder and a linear head. It knows nothing of constraints.

    Args:
        encoder: From images (batch, 3, size, size) to features (batch, width).
        head: From features to logits (batch, classes).
        classes: Names in the order of the labels. A checkpoint with another order is refused.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear, classes: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.classes = list(classes)
        self.domains: Sequence[Domain] = ()  # what test_step's dataloaders are

    def forward(self, images: Tensor) -> Tensor:
        """Classify images into logits (batch, classes)."""
        return self.head(self.encoder(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("val_acc", (self(images).argmax(dim=1) == labels).float().mean(), prog_bar=True, sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy under the domain's name."""
        images, labels = batch
        domain = self.domains[dataloader_idx]
        logits = self(images) if domain.classes is None else only(self(images), domain.classes)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log(domain.name, accuracy, sync_dist=True, add_dataloader_idx=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also saves the order of the classes."""
        checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses another order of the classes."""
        check_classes("the checkpoint", checkpoint["classes"], self.classes)


def shared_arguments(
    description: str | None, layout: str, *, epochs: int, whose: str, batch_size: int
) -> argparse.ArgumentParser:
    """A parser with the options that both experiments have; ``whose`` idea the number of epochs is."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"layout of DATA:\n{layout}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=120),
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder of the images, see below")
    add("--output", type=Path, default=Path("demo_output/paper"), help="checkpoints and table (default: %(default)s)")
    add("--epochs", type=int, default=epochs, help=f"of fine-tuning (default: %(default)s, {whose})")
    add("--batch-size", type=int, default=batch_size, help="over all devices together (default: %(default)s, authors')")
    add("--radius-batch-size", type=int, default=64, help="the same, for the radii (default: %(default)s, authors')")
    add("--radius-lr", type=float, default=1e-2, help="Adam's rate for the radii (default: %(default)s, authors')")
    add("--size", type=int, default=224, help="side of the images in pixels (default: %(default)s, authors')")
    add("--devices", type=int, default=1, help="number of GPUs (default: %(default)s)")
    add("--precision", default="32-true", help="of the Trainer; bf16-mixed is faster (default: %(default)s)")
    add("--workers", type=int, default=8, help="processes that read images, per GPU (default: %(default)s)")
    add("--seed", type=int, default=0, help="of split, head and order (default: %(default)s)")
    return parser


def loader(
    items: Sequence[Item],
    view: View,
    batch_size: int,
    arguments: argparse.Namespace,
    *,
    train: bool = False,
    shuffle: bool = False,
) -> DataLoader[tuple[Tensor, int]]:
    """Batches of ``batch_size`` images over all devices together. ``train``: augmented, shuffled, only whole ones."""
    return DataLoader(
        Images(items, view, augment=train),
        batch_size=max(1, batch_size // arguments.devices),
        shuffle=train or shuffle,
        drop_last=train,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def make_trainer(arguments: argparse.Namespace, **options: Any) -> Trainer:
    """A trainer with the devices and the precision of the command line."""
    defaults: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    return Trainer(devices=arguments.devices, precision=arguments.precision, **{**defaults, **options})


def fine_tune(
    model: Classifier,
    folder: Path,
    arguments: argparse.Namespace,
    train: DataLoader[tuple[Tensor, int]],
    held_out: DataLoader[tuple[Tensor, int]],
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Path:
    """Fit, and load the epoch that is best on the held-out images; returns its checkpoint.

    An interrupted fit goes on after its last whole epoch, and one that was finished is not repeated.
    """
    # `save_last` would save no epoch but those that are better than all before
    best = ModelCheckpoint(
        folder, "best", monitor="val_acc", mode="max", save_weights_only=True, enable_version_counter=False
    )
    every = ModelCheckpoint(folder, "last", enable_version_counter=False)
    trainer = make_trainer(
        arguments,
        callbacks=[*callbacks, best, every],
        max_epochs=arguments.epochs,
        enable_checkpointing=True,
        **options,
    )
    last = folder / "last.ckpt"
    trainer.fit(model, train, held_out, ckpt_path=last if last.exists() else None)
    model.load_state_dict(torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"])
    return Path(best.best_model_path)


def evaluate(
    model: Classifier, domains: Sequence[Domain], view: View, arguments: argparse.Namespace
) -> dict[str, float]:
    """Accuracy in % by domain."""
    model.domains = domains
    trainer = make_trainer(arguments)
    loaders = [loader(domain.items, view, 2 * arguments.batch_size, arguments) for domain in domains]
    trainer.test(model, loaders, verbose=False)
    return {domain.name: 100 * float(trainer.callback_metrics[domain.name]) for domain in domains}


@rank_zero_only
def report(columns: Mapping[str, Mapping[str, float]], averaged: Sequence[str], caption: str, path: Path) -> None:
    """Print a Markdown table of accuracies, its last row their mean over the domains ``averaged``, and write it."""
    names = list(columns)
    domains = list(columns[names[0]])
    rows = [["domain", *names], ["---", *("---:" for _ in names)]]
    rows += [[domain, *(f"{columns[name][domain]:.2f}" for name in names)] for domain in domains]
    means = (mean(columns[name][domain] for domain in averaged) for name in names)
    rows += [[f"mean of {', '.join(averaged)}", *(f"{value:.2f}" for value in means)]]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{caption}\n"
    path.write_text(text)
    print(text)
