"""What a suite is: a pretrained module, data to fine-tune on, and domains to test on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SUITES = ("emoji", "digits", "sentiment")


class Data(LightningDataModule):
    """Data to fine-tune on, held-out data of the same kind, and test sets by domain.

    Args:
        pool: Inputs and labels; the seed decides which of them are for what.
        domains: Test sets by name.
        seed: Of the split and of the order of the training data.
        train: Number of training examples.
        held_out: Number of examples that TPGM learns its radii from.
        choice: Number of examples that settings are chosen by, and that serve nothing else; 0: by the held-out ones.
    """

    def __init__(
        self,
        pool: TensorDataset,
        domains: Mapping[str, TensorDataset],
        seed: int,
        *,
        train: int,
        held_out: int,
        choice: int = 0,
    ) -> None:
        super().__init__()
        mixed = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        parts = mixed[: train + held_out + choice].split([train, held_out, choice])
        self.train, self.held_out, self.choice = (TensorDataset(*pool[part]) for part in parts)
        if choice == 0:
            self.choice = self.held_out
        self.domains = domains
        self.seed = seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training data, shuffled."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, batch_size=32, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Held-out data, from which TPGM learns its radii."""
        return DataLoader(self.held_out, batch_size=50)


@dataclass(frozen=True)
class Suite:
    """One setting to compare methods in.

    Attributes:
        name: Of its results file.
        data: Makes the data of a seed.
        model: Makes the pretrained module with a learning rate; with ``again=True`` that of a second pretraining.
        head: Pattern of the names of the head's parameters.
        probe_first: Whether every method starts from a linear probe, because the head has no pretrained weights.
        learning_rates: The grid for plain fine-tuning; all methods use the one that is chosen.
        also: Learning rates at which plain fine-tuning is reported, and that are not chosen.
        epochs: Of fine-tuning, and of a linear probe.
        in_distribution: The domain of the training data.
        groups: The other domains: name of the group, its domains.
        precision: Of the Trainer.
        selection_seeds: Number of seeds that settings are chosen by.
        elsewhere: Other conditions that some methods are compared under: by name, the settings that differ.
    """

    name: str
    data: Callable[[int], Data]
    model: Callable[..., LightningModule]
    head: str
    probe_first: bool
    learning_rates: tuple[float, ...]
    epochs: int
    in_distribution: str
    groups: Mapping[str, tuple[str, ...]]
    precision: str = "32-true"
    selection_seeds: int = 3
    also: tuple[float, ...] = ()
    elsewhere: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        """All test domains, the one in distribution first."""
        return (self.in_distribution, *(domain for group in self.groups.values() for domain in group))


def load_suite(name: str) -> Suite:
    """Import a suite; each needs packages that the others do not."""
    suite: Suite = importlib.import_module(name).SUITE
    return suite
