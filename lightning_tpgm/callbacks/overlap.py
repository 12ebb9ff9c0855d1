"""Are the held-out data held out, and are they many enough?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_tpgm.callbacks.framework import pl, rank_zero_info, rank_zero_warn
from lightning_tpgm.callbacks.loaders import flat, parts

FEW = 100
"""With 60 and 25 examples the benchmark lost accuracy in distribution, with 100 and 400 not."""


def look_at_examples(trainer: pl.Trainer, held_out: Sequence[Any]) -> None:
    """Warn if the held-out data are known to hold training data, and say if they are known to be few."""
    training = trainer.train_dataloader  # not its truth, which is a length that it may not have
    loaders = [part for loader in held_out for part in parts(loader)]
    shared, count = shared_examples([] if training is None else flat(training), loaders)
    if shared:
        rank_zero_warn(
            f"{shared} of the {count} held-out examples are training examples, too: radii that are learned on them let"
            " through what fits the training data. Pass other data as `dataloader`, or define tpgm_dataloader()."
        )
    if count < FEW and all(_examples(loader) is not None for loader in loaders):
        rank_zero_info(
            f"{count} held-out examples are few: radii follow their noise, which may cost accuracy. Hold out {FEW} or"
            " more, or pass a `dataloader` that draws half of its examples from the training data."
        )


def shared_examples(training: Sequence[Any], held_out: Sequence[Any]) -> tuple[int, int]:
    """How many examples of the held-out loaders are in the training loaders, and of how many.

    Only what is certain counts: the same data set object, with known indices. Samplers of unknown kind, iterable data
    sets and whatever is no DataLoader are passed over.

    Args:
        training: Loaders.
        held_out: Loaders.

    >>> import torch
    >>> data = torch.utils.data.TensorDataset(torch.rand(10, 2))
    >>> shared_examples([DataLoader(Subset(data, range(6)))], [DataLoader(Subset(data, range(4, 10)))])
    (2, 6)
    """
    known = [found for found in map(_examples, training) if found is not None]
    shared = count = 0
    for dataset, indices in (found for found in map(_examples, held_out) if found is not None):
        drawn = set(indices)
        seen = {index for base, others in known if base is dataset for index in others if index in drawn}
        shared, count = shared + len(seen), count + len(drawn)
    return shared, count


def _examples(loader: Any) -> tuple[Dataset[Any], Iterable[int]] | None:
    """The data set at the bottom of a loader, and which of its examples are drawn."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if type(loader.batch_sampler) not in (BatchSampler, type(None)) or not hasattr(loader.dataset, "__len__"):
        return None
    sampler = loader.sampler
    indices: Sequence[int]
    if isinstance(sampler, SubsetRandomSampler):
        indices = list(sampler.indices)
    elif isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler):
        source = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
        if source is not loader.dataset:
            return None
        indices = range(len(loader.dataset))
    else:
        return None
    dataset: Any = loader.dataset
    while isinstance(dataset, Subset):
        indices = [int(dataset.indices[index]) for index in indices]
        dataset = dataset.dataset
    return dataset, indices
