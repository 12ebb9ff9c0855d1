"""Are the held-out data held out, and are they many enough?"""

from __future__ import annotations

from collections import defaultdict
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
"""On the benchmark's digits 25 examples cost accuracy in distribution. 100 and 400 hardly differed."""


def look_at_examples(trainer: pl.Trainer, held_out: Sequence[Any], may_overlap: bool) -> None:
    """Warn if the held-out data are known to hold training data, unless they may. Say if they are known to be few."""
    training = trainer.train_dataloader  # not its truth, which is a length that it may not have
    loaders = [part for loader in held_out for part in parts(loader)]
    shared, count = shared_examples([] if training is None else flat(training), loaders)
    if shared and not may_overlap:
        rank_zero_warn(
            f"{shared} of the {count} held-out examples are training examples, too: radii that are learned on them let"
            " through what fits the training data. Pass other data as `dataloader`, or define tpgm_dataloader()."
        )
    elif 0 < count < FEW and all(_counts(loader, trainer.world_size) for loader in loaders):
        rank_zero_info(
            f"The held-out data have few examples, {count}. By their noise radii may stay small, which costs accuracy"
            f" in distribution. Hold out {FEW} or more. Or pass a `dataloader` that draws half of its examples from the"
            " training data, which costs some robustness."
        )


def _counts(loader: Any, processes: int) -> bool:
    """Whether it is known how many examples it draws for all processes, and that they are no batches already."""
    alone = processes == 1 or isinstance(getattr(loader, "sampler", None), DistributedSampler)
    return alone and _examples(loader) is not None and loader.batch_sampler is not None


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
    drawn: dict[int, set[int]] = defaultdict(set)  # by data set
    for dataset, indices in filter(None, map(_examples, held_out)):
        drawn[id(dataset)].update(indices)
    seen: dict[int, set[int]] = defaultdict(set)
    for dataset, indices in filter(None, map(_examples, training)):
        seen[id(dataset)] |= drawn.get(id(dataset), set()).intersection(indices)
    return sum(map(len, seen.values())), sum(map(len, drawn.values()))


def _examples(loader: Any) -> tuple[Dataset[Any], Iterable[int]] | None:
    """The data set at the bottom of a loader, and which of its examples are drawn."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if type(loader).__iter__ is not DataLoader.__iter__:
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
