"""What a suite is: a pretrained module, data to fine-tune on, and domains to test on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Sampler, Subset, TensorDataset, WeightedRandomSampler

SUITES = ("digits", "emoji", "sentiment")
USUAL, COSINE = "usual", "cosine"  # conditions that tables ask for by name
FEW = ("25 held out", "30 held out")


class Data(LightningDataModule):
    """Data to fine-tune on, held-out data of the same kind, and test sets by domain.

    Args:
        pool: Inputs and labels; the seed decides which of them are for what.
        domains: Test sets by name.
        seed: Of the split and of the order of the training data.
        train: Number of training examples.
        held_out: Number of validation examples. TPGM learns its radii from them, and sweeps choose alpha by them.
        choice: Number of examples that rates and settings are chosen by, and that serve nothing else.
    """

    def __init__(
        self,
        pool: TensorDataset,
        domains: Mapping[str, TensorDataset],
        seed: int,
        *,
        train: int,
        held_out: int,
        choice: int,
    ) -> None:
        super().__init__()
        mixed = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        parts = mixed[: train + held_out + choice].split([train, held_out, choice])
        self.train, self.held_out, self.choice = (TensorDataset(*pool[part]) for part in parts)
        self.domains = domains
        self.seed = seed
        self.batch, self.held_out_batch = 32, 50
        self.training_share = 0.0  # of the examples that radii are learned from
        self.rotates = False  # whether each epoch holds out other examples

    def hold_out(self, count: int) -> None:
        """Hold out so many examples: fewer of the held-out ones, or those that choose settings, too."""
        both = zip(self.held_out.tensors, self.choice.tensors, strict=True)
        self.held_out = TensorDataset(*(torch.cat(pair)[:count] for pair in both))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training data, shuffled."""
        epoch = self.epoch() if self.rotates else 0
        generator = torch.Generator().manual_seed(self.seed + 1000 * epoch)
        data = Subset(self.all(), self.fold(epoch)[1]) if self.rotates else self.train
        return DataLoader(data, batch_size=self.batch, shuffle=True, generator=generator)

    def epoch(self) -> int:
        """The present one, 0 before a fit."""
        return 0 if self.trainer is None else self.trainer.current_epoch

    def all(self) -> ConcatDataset[tuple[Tensor, ...]]:
        """What an epoch may hold out: this data set's held-out examples first."""
        return ConcatDataset([self.held_out, self.train])

    def fold(self, epoch: int) -> tuple[list[int], list[int]]:
        """Which of all examples an epoch holds out and trains on, if folds rotate."""
        count, size = len(self.held_out) + len(self.train), len(self.held_out)
        held_out = [(epoch * size + i) % count for i in range(size)]
        return held_out, sorted({*range(count)} - {*held_out})

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Held-out data, in batches of ten: a standard error over batches needs several."""
        return DataLoader(self.held_out, batch_size=10)

    def tpgm_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same data in larger batches, for the radii; drawn with replacement where training data are among them."""
        if self.rotates:
            return DataLoader(self.all(), batch_sampler=PresentFold(self))
        if not self.training_share:
            return DataLoader(self.held_out, batch_size=self.held_out_batch, shuffle=True)
        shares = {self.held_out: 1 - self.training_share, self.train: self.training_share}
        weights = [share / len(data) for data, share in shares.items() for _ in range(len(data))]
        sampler = WeightedRandomSampler(weights, len(self.train), generator=torch.Generator().manual_seed(self.seed))
        return DataLoader(ConcatDataset(list(shares)), batch_size=self.held_out_batch, sampler=sampler)


class PresentFold(Sampler[list[int]]):
    """Batches of what the present epoch holds out."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __iter__(self) -> Iterator[list[int]]:
        """Pass after pass without end, the last one of an epoch cut short."""
        while True:
            epoch = self.data.epoch()
            fold = torch.tensor(self.data.fold(epoch)[0])
            for part in torch.randperm(len(fold)).split(self.data.held_out_batch):
                if self.data.epoch() == epoch:
                    yield fold[part].tolist()


@dataclass(frozen=True)
class Suite:
    """One setting to compare methods in.

    Attributes:
        name: Of its results file.
        data: Makes the data of a seed.
        model: Makes the module that fine-tuning with this seed starts from, with this learning rate.
        rates: Learning rates of the constant schedule, from small to large.
        epochs: Of fine-tuning.
        in_distribution: The domain of the training data.
        groups: The other domains: name of the group, its domains.
        conditions: By name, what differs from the usual: ``rates``, ``schedule``, ``length``, ``momentum`` (of SGD),
            ``precision``, size of the ``batch`` or the ``held_out_batch``, number of examples that are ``held_out``;
            ``methods``, if not all are compared.
        exclude: What methods do not constrain: a head that has no pretrained weights.
        seeds: How many there are; on emoji each is a fold with a pretrained network of its own.
    """

    name: str
    data: Callable[[int], Data]
    model: Callable[[int, float], LightningModule]
    rates: tuple[float, ...]
    epochs: int
    in_distribution: str
    groups: Mapping[str, tuple[str, ...]]
    conditions: Mapping[str, Mapping[str, object]]
    exclude: tuple[str, ...] = ()
    seeds: int = 5

    @property
    def shifted(self) -> tuple[str, ...]:
        """All domains but the one in distribution."""
        return tuple(domain for group in self.groups.values() for domain in group)

    @property
    def domains(self) -> tuple[str, ...]:
        """All test domains, the one in distribution first."""
        return (self.in_distribution, *self.shifted)


def load_suite(name: str) -> Suite:
    """Import a suite; each needs packages that the others do not."""
    suite: Suite = importlib.import_module(name).SUITE
    return suite
